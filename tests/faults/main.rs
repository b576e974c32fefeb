//! The check of a server under faults finds each planted fault, and none in a correct server.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::faults::{
    Broken, Check, Fault, Faulty, PanicLayer, Passed, Plan, Promise, check,
};
use tower_tcp::{ConnectionService, Pipeline};

#[path = "../support/certificates.rs"]
mod certificates;
mod codecs;
mod layers;
mod raw;
mod services;
mod tls;
mod unix;

const INPUT: &str = "one\ntwo\n\nthree\n";

/// The faults of a check.
const FAULTS: [Fault; 6] = [
    Fault::Cut,
    Fault::Delay(Duration::from_millis(100)),
    Fault::Stall,
    Fault::End,
    Fault::Reset,
    Fault::Panic,
];

async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
    Ok(line)
}

/// Checks an echo of lines.
fn check_echo<F, S>(stack: F) -> Check<F>
where
    F: FnMut() -> S,
    S: ConnectionService<Faulty>,
{
    check(stack, INPUT, INPUT)
}

/// The planted faults that were checked, as a table.
#[derive(Default)]
struct Table {
    rows: Vec<String>,
    wrong: Vec<String>,
}

impl Table {
    fn found(&mut self, planted: &str, promise: Promise, result: Result<Passed, Broken>) {
        match result {
            Ok(passed) => {
                let runs = passed.runs();
                self.wrong
                    .push(format!("{planted}: {runs} runs found nothing"));
            }
            Err(broken) => {
                let plan = broken.plan();
                let row = format!("| {planted} | {promise:?} | `{plan}` |");
                self.rows.push(row);
                if broken.promise() != promise {
                    self.wrong.push(format!("{planted}: {broken}"));
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_found_in_a_right_server() {
    let one_at_a_time = || Pipeline::new(Lines::default).service(service_fn(echo));
    let in_flight = || {
        Pipeline::new(Lines::default)
            .service(service_fn(echo))
            .in_flight(8)
    };

    let passed = check_echo(one_at_a_time).await.unwrap();
    check_echo(in_flight).await.unwrap();
    check_echo(raw::right).await.unwrap();

    // Six faults at each place, including the end of the input; two runs for each of 64 seeds; and
    // three more runs.
    assert_eq!(passed.runs(), 6 * (16 + 15) + 2 * 64 + 3);
}

#[tokio::test(start_paused = true)]
async fn a_check_has_no_more_places_than_it_is_told() {
    let passed = check_echo(raw::right).places(4).seeds(0..0).await.unwrap();

    assert_eq!(passed.runs(), 6 * (4 + 4) + 3);
}

/// Checks an echo, and then again by the script of the promise that it has broken.
async fn finds_again<F, S>(promise: Promise, mut stack: impl FnMut() -> F)
where
    F: FnMut() -> S + 'static,
    S: ConnectionService<Faulty>,
{
    let broken = check_echo(stack()).await.expect_err("it is broken");
    assert_eq!(broken.promise(), promise, "{broken}");

    let again = check_echo(stack()).only(broken.plan().clone());
    let again = again.await.expect_err("it is broken again");

    let text = broken.to_string();
    let text = text.split("; shortened from").next();
    assert_eq!(Some(&*again.to_string()), text);
    assert!(again.to_string().contains("Plan::new()"), "{again}");
}

#[tokio::test(start_paused = true)]
async fn a_broken_promise_is_found_again_by_its_script() {
    finds_again(Promise::Same, || raw::one_read_is_a_line).await;
    finds_again(Promise::HalfClose, || raw::forgets_replies_at_half_a_line).await;
    finds_again(Promise::Accepts, || services::replies_by_the_clock).await;
    finds_again(Promise::Repeats, raw::reports_every_other_error).await;
}

#[tokio::test(start_paused = true)]
async fn a_script_runs_once_with_all_that_its_promises_need() {
    let end = Plan::new().read(1, Fault::End);
    for (plan, runs) in [(Plan::new(), 4), (end.clone(), 4), (end.pieces(1), 4)] {
        let passed = check_echo(raw::right).only(plan).await.unwrap();

        assert_eq!(passed.runs(), runs);
    }
    let cut = Plan::new().read(1, Fault::Cut);
    assert_eq!(check_echo(raw::right).only(cut).await.unwrap().runs(), 3);
}

#[test]
fn a_delay_is_printed_exactly() {
    for (time, text) in [
        (Duration::ZERO, "from_millis(0)"),
        (Duration::from_millis(1_500), "from_millis(1500)"),
        (Duration::from_micros(1_500), "new(0, 1500000)"),
        (Duration::new(2, 1), "new(2, 1)"),
        (Duration::MAX, "new(18446744073709551615, 999999999)"),
        (
            Duration::from_secs(u64::MAX),
            "new(18446744073709551615, 0)",
        ),
    ] {
        let plan = Plan::new().read(1, Fault::Delay(time));

        let expected = format!("Plan::new().read(1, Fault::Delay(Duration::{text}))");
        assert_eq!(plan.to_string(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_promise_that_a_protocol_does_not_make_is_not_checked() {
    let stack = || codecs::lines(codecs::Flaw::HalfALineAtTheEnd);
    let broken = check_echo(stack).await.unwrap_err();
    assert_eq!(broken.promise(), Promise::Prefix);

    check_echo(stack).except(Promise::Prefix).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn errors_of_accept_are_not_checked_if_the_protocol_makes_no_such_promise() {
    // The second server of a check is the one whose accepts fail.
    let second_closes = || {
        let mut servers = 0;
        move || {
            servers += 1;
            raw::right_unless(servers == 2)
        }
    };
    let broken = check_echo(second_closes()).await.unwrap_err();
    assert_eq!(broken.promise(), Promise::Accepts);

    let check = check_echo(second_closes()).except(Promise::Accepts);
    // Without that run, another one is the second.
    let broken = check.await.unwrap_err();
    assert_eq!(broken.promise(), Promise::Same);
}

#[tokio::test]
#[should_panic(expected = "start_paused")]
async fn a_clock_that_runs_is_noticed() {
    let stack = || Pipeline::new(Lines::default).service(service_fn(echo));
    drop(check_echo(stack).await);
}

#[tokio::test(start_paused = true)]
async fn a_stream_has_each_fault_at_its_place() {
    let second = Duration::from_secs(1);
    let start = Instant::now();
    let (mut client, server) = tokio::io::duplex(64);
    let plan = Plan::new()
        .read(1, Fault::Cut)
        .read(3, Fault::Delay(second));
    let plan = plan
        .read(4, Fault::End)
        .write(2, Fault::Cut)
        .write(5, Fault::Stall);
    let mut server = Faulty::new(server, plan);
    client.write_all(b"abcdef").await.unwrap();
    let mut buf = [0; 8];
    assert_eq!(server.read(&mut buf).await.unwrap(), 1);
    assert_eq!(server.read(&mut buf).await.unwrap(), 2);
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert_eq!(server.read(&mut buf).await.unwrap(), 1);
    assert_eq!(start.elapsed(), second);
    assert_eq!(server.read(&mut buf).await.unwrap(), 0);
    assert_eq!(server.write(b"abcdef").await.unwrap(), 2);
    assert_eq!(server.write(b"cdef").await.unwrap(), 3);
    let stalled = tokio::time::timeout(second, server.write(b"f")).await;
    assert!(stalled.is_err());

    let (_client, server) = tokio::io::duplex(64);
    let mut server = Faulty::new(server, Plan::new().write(1, Fault::Reset));
    server.write_all(b"a").await.unwrap();
    let failed = server.write(b"b").await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::ConnectionReset);
    let failed = server.read(&mut buf).await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test(start_paused = true)]
async fn a_reset_of_one_half_wakes_the_other() {
    let delay = Fault::Delay(Duration::from_secs(1));
    for waits in [
        Plan::new(),
        Plan::new().read(0, Fault::Stall),
        Plan::new().read(0, delay),
    ] {
        let (_client, server) = tokio::io::duplex(64);
        let server = Faulty::new(server, waits.clone().write(0, Fault::Reset));
        let (mut reader, mut writer) = tokio::io::split(server);
        let read = tokio::spawn(async move { reader.read_u8().await });
        tokio::task::yield_now().await;

        writer.write_u8(1).await.unwrap_err();

        let read = tokio::time::timeout(2 * Duration::from_secs(1), read).await;
        let read = read.unwrap_or_else(|_| panic!("{waits}: it is not woken"));
        let failed = read.unwrap().unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_seed_gives_the_same_plan_within_its_bounds() {
    for seed in 0..1000 {
        let plan = Plan::seeded(seed, 10, 20);
        assert_eq!(plan, Plan::seeded(seed, 10, 20));
        assert_ne!(plan, Plan::new());
        let far = Plan::seeded(seed, usize::MAX, usize::MAX);
        assert_eq!(far, Plan::seeded(seed, usize::MAX, usize::MAX));
    }
}

#[tokio::test(start_paused = true)]
async fn each_planted_fault_is_found() {
    let mut table = Table::default();
    codecs::find_all(&mut table).await;
    services::find_all(&mut table).await;
    raw::find_all(&mut table).await;
    layers::find_all(&mut table).await;
    println!("| planted | promise | shortest script |\n| --- | --- | --- |");
    println!("{}", table.rows.join("\n"));
    assert!(table.wrong.is_empty(), "{:#?}", table.wrong);
    assert!(table.rows.len() >= 25, "{}", table.rows.len());
}

/// A service of lines that panics.
fn panics() -> impl ConnectionService<Faulty> {
    let echo = tower::ServiceBuilder::new()
        .layer(PanicLayer::at_call(2))
        .service_fn(echo);
    Pipeline::new(Lines::default).service(echo)
}

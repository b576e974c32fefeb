//! Faults in a service of requests, and in the settings of its pipeline.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::faults::{Faulty, Promise};
use tower_tcp::{ConnectionService, Pipeline, Reply};

use super::{Table, check_echo, echo, panics};

fn replies_twice() -> impl ConnectionService<Faulty> {
    Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
        let twice = line == "two";
        let line = if twice { "two\ntwo".into() } else { line };
        Ok::<_, Infallible>(line)
    }))
}

fn forgets_the_last_reply() -> impl ConnectionService<Faulty> {
    Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
        let forgotten = line == "three";
        let reply = if forgotten {
            Reply::none()
        } else {
            line.into()
        };
        Ok::<Reply<Bytes>, Infallible>(reply)
    }))
}

fn counts_over_all_connections() -> impl ConnectionService<Faulty> {
    let count = Arc::new(AtomicUsize::new(0));
    Pipeline::new(Lines::default).service(service_fn(move |line: Bytes| {
        let count = count.fetch_add(1, Ordering::Relaxed);
        let line = if count < 4 { line } else { "again".into() };
        async move { Ok::<_, Infallible>(line) }
    }))
}

fn remembers_the_line_before() -> impl ConnectionService<Faulty> {
    let before = Arc::new(Mutex::new(Bytes::new()));
    Pipeline::new(Lines::default).service(service_fn(move |line: Bytes| {
        let mut before = before.lock().expect("no holder panics");
        // A conversation that is not cut off ends with `three`.
        let leaked = line == "one" && !before.is_empty() && *before != "three";
        *before = line.clone();
        let line = if leaked { "leaked".into() } else { line };
        async move { Ok::<_, Infallible>(line) }
    }))
}

fn never_answers_a_line() -> impl ConnectionService<Faulty> {
    Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
        if line == "three" {
            std::future::pending::<()>().await;
        }
        Ok::<_, Infallible>(line)
    }))
}

pub(crate) fn replies_by_the_clock() -> impl ConnectionService<Faulty> {
    let start = tokio::time::Instant::now();
    Pipeline::new(Lines::default).service(service_fn(move |line: Bytes| async move {
        let late = start.elapsed() > Duration::from_millis(50);
        let line = if late { "late".into() } else { line };
        Ok::<_, Infallible>(line)
    }))
}

fn replies_in_any_order() -> impl ConnectionService<Faulty> {
    let by_length = service_fn(|line: Bytes| async move {
        sleep(Duration::from_millis(line.len() as u64)).await;
        Ok::<_, Infallible>(line)
    });
    Pipeline::new(Lines::default)
        .service(by_length)
        .multiplexed(8)
}

fn waits_for_ever_for_input() -> impl ConnectionService<Faulty> {
    let deadlines = Deadlines::default().first_byte(None).idle(None).frame(None);
    Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .deadlines(deadlines)
}

fn waits_for_ever_for_room() -> impl ConnectionService<Faulty> {
    let deadlines = Deadlines::default().write(None).half_closed(None);
    Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .deadlines(deadlines)
}

pub(crate) async fn find_all(table: &mut Table) {
    let found = check_echo(replies_twice).await;
    table.found("service: replies twice", Promise::Plain, found);
    let found = check_echo(forgets_the_last_reply).await;
    table.found("service: forgets the last reply", Promise::Plain, found);
    let found = check_echo(panics).await;
    table.found("service: panics in a call", Promise::Plain, found);
    let found = check_echo(never_answers_a_line).await;
    table.found("service: never answers a line", Promise::Plain, found);
    let found = check_echo(counts_over_all_connections).await;
    table.found(
        "service: counts over all connections",
        Promise::Others,
        found,
    );
    let found = check_echo(remembers_the_line_before).await;
    table.found("service: leaks a line cut off", Promise::Others, found);
    let found = check_echo(replies_by_the_clock).await;
    table.found("service: replies by the clock", Promise::Accepts, found);
    let found = check_echo(replies_in_any_order).await;
    table.found("service: order by the time of calls", Promise::Plain, found);
    let found = check_echo(waits_for_ever_for_input).await;
    table.found("pipeline: no deadline for input", Promise::Ends, found);
    let found = check_echo(waits_for_ever_for_room).await;
    table.found("pipeline: no deadline for output", Promise::Ends, found);
}

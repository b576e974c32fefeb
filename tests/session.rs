//! A session: state of one connection, called by `&mut self`, without a lock in the user's code.

mod support;

use std::convert::Infallible;
use std::future::ready;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_test::{assert_pending, assert_ready, assert_ready_eq, task};
use tower::timeout::error::Elapsed;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Event, Session, SessionService};
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Reply};

use support::{Clients, Ends, each_way, settled};

const SEC: Duration = Duration::from_secs(1);

/// Keeps all lines, and replies with them. A line with a number takes that many seconds, and is
/// kept as `(` when its call begins and `)` when the call is done. The line `panic` panics.
#[derive(Default)]
struct Diary {
    lines: String,
    /// The number of dropped diaries.
    dropped: Arc<AtomicUsize>,
}

impl Session<Bytes> for Diary {
    type Reply = Bytes;
    type Error = BoxError;

    async fn call(&mut self, line: Bytes) -> Result<Bytes, BoxError> {
        let text = str::from_utf8(&line)?;
        assert_ne!(text, "panic");
        if let Ok(seconds) = text.parse() {
            self.lines.push('(');
            sleep(SEC * seconds).await;
            self.lines.push(')');
        } else {
            self.lines.push_str(text);
        }
        Ok(self.lines.clone().into())
    }
}

impl Drop for Diary {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// Makes a diary for each connection.
async fn diary(_: Peer<Bytes>) -> Result<SessionService<Diary, Bytes>, Infallible> {
    Ok(SessionService::new(Diary::default()))
}

#[tokio::test(start_paused = true)]
async fn a_session_keeps_its_state_from_call_to_call_and_for_its_connection_alone() {
    for served in each_way(Pipeline::new(Lines::default).make_service(service_fn(diary))) {
        let (mut ann, mut bob) = (served.client().await, served.client().await);

        assert_eq!(ann.ask("a").await, "a", "{}", served.way());
        assert_eq!(ann.ask("b").await, "ab", "{}", served.way());
        assert_eq!(bob.ask("c").await, "c", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn the_calls_of_a_session_come_in_order_and_one_at_a_time_in_each_way_of_dispatch() {
    for served in each_way(Pipeline::new(Lines::default).make_service(service_fn(diary))) {
        let mut client = served.client().await;
        let begun = Instant::now();

        client.send("a\n2\nb\n1\nc\n").await;

        for answer in ["a", "a()", "a()b", "a()b()", "a()b()c"] {
            assert_eq!(client.line().await, answer, "{}", served.way());
        }
        assert_eq!(begun.elapsed().as_secs(), 3, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_of_events_is_called_with_requests_and_with_messages() {
    struct Clock {
        peer: Peer<Bytes, u32>,
        last: u32,
    }
    impl Session<Event<Bytes, u32>> for Clock {
        type Reply = Reply<Bytes>;
        type Error = BoxError;

        async fn call(&mut self, event: Event<Bytes, u32>) -> Result<Reply<Bytes>, BoxError> {
            Ok(match event {
                Event::Request(_line) => {
                    self.last += 1;
                    let _runs_until_the_end = self.peer.post_after(SEC, self.last)?;
                    Reply::none()
                }
                Event::Message(n) => Bytes::from(format!("{n} of {}", self.last)).into(),
            })
        }
    }
    let make = service_fn(|peer| async move {
        Ok::<_, Infallible>(SessionService::new(Clock { peer, last: 0 }))
    });
    for served in each_way(Pipeline::new(Lines::default).make_event_service(make)) {
        let mut client = served.client().await;

        client.send("\n\n").await;

        assert_eq!(client.line().await, "1 of 2", "{}", served.way());
        assert_eq!(client.line().await, "2 of 2", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_a_timeout_drops_leaves_the_session_as_it_was_at_its_await() {
    let make = service_fn(|_: Peer<Bytes>| {
        let diary = SessionService::new(Diary::default());
        let service = ServiceBuilder::new().timeout(5 * SEC).service(diary);
        ready(Ok::<_, Infallible>(service))
    });
    let pipeline = Pipeline::new(Lines::default)
        .make_service(make)
        .shutdown_on_error(false);
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        assert_eq!(client.ask("a").await, "a", "{}", served.way());
        let begun = Instant::now();

        client.send("30\nb\n").await;

        assert_eq!(client.line().await, "a(b", "{}", served.way());
        assert_eq!(begun.elapsed().as_secs(), 5, "{}", served.way());
        assert_eq!(client.ask("1").await, "a(b()", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_around_a_session_ends_its_connection_where_errors_do() {
    let make = service_fn(|_: Peer<Bytes>| {
        let diary = SessionService::new(Diary::default());
        let service = ServiceBuilder::new().timeout(5 * SEC).service(diary);
        ready(Ok::<_, Infallible>(service))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));

    assert_eq!(served.client().await.ask("30").await, "");

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::ServiceError);
    assert!(find_cause::<Elapsed>(end.error().unwrap()).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_a_session_ends_its_connection_and_no_other() {
    for served in each_way(Pipeline::new(Lines::default).make_service(service_fn(diary))) {
        let (mut ann, mut bob) = (served.client().await, served.client().await);
        assert_eq!(bob.ask("b").await, "b", "{}", served.way());

        ann.send("a\npanic\nc\n").await;

        assert_eq!(ann.rest().await, ["a"], "{}", served.way());
        assert_eq!(served.reason().await, EndReason::Panic, "{}", served.way());
        assert_eq!(bob.ask("b").await, "bb", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_is_dropped_once_with_its_connection_also_in_the_middle_of_a_call() {
    for last in ["a", "30"] {
        let dropped = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&dropped);
        let make = service_fn(move |_: Peer<Bytes>| {
            let diary = Diary {
                lines: String::new(),
                dropped: Arc::clone(&count),
            };
            ready(Ok::<_, Infallible>(SessionService::new(diary)))
        });
        for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
            dropped.store(0, Ordering::SeqCst);
            let mut client = served.client().await;
            client.send(format!("{last}\n")).await;
            settled().await;
            assert_eq!(dropped.load(Ordering::SeqCst), 0, "{}", served.way());

            served.handle().abort();

            assert_eq!(served.reason().await, EndReason::Killed, "{}", served.way());
            assert_eq!(dropped.load(Ordering::SeqCst), 1, "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_is_dropped_when_its_connection_begins_to_close_and_may_wait_for_the_end() {
    struct Guest(Peer<Bytes>, mpsc::Sender<EndReason>);
    impl Session<Bytes> for Guest {
        type Reply = Reply<Bytes>;
        type Error = Infallible;

        async fn call(&mut self, line: Bytes) -> Result<Reply<Bytes>, Infallible> {
            Ok(Reply::from(line).close())
        }
    }
    impl Drop for Guest {
        fn drop(&mut self) {
            let (peer, tell) = (self.0.clone(), self.1.clone());
            tell.try_send(EndReason::ServiceClosed).unwrap();
            tokio::spawn(async move { tell.send(peer.closed().await.reason()).await });
        }
    }
    let (tell, mut told) = mpsc::channel(2);
    let make = service_fn(move |peer| {
        ready(Ok::<_, Infallible>(SessionService::new(Guest(
            peer,
            tell.clone(),
        ))))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));
    let mut client = served.client().await;
    let begun = Instant::now();

    // The server lingers, as the client does not close.
    assert_eq!(client.ask("bye").await, "bye");

    assert_eq!(told.recv().await, Some(EndReason::ServiceClosed));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(told.recv().await, Some(EndReason::ServiceClosed));
    assert_eq!(begun.elapsed(), 2 * SEC);
}

// Without a server.

#[tokio::test(start_paused = true)]
async fn a_session_is_not_ready_while_a_call_runs_and_wakes_who_waits_when_it_is_done() {
    let mut diary = task::spawn(SessionService::new(Diary::default()));
    assert_ready!(diary.enter(|cx, mut diary| diary.poll_ready(cx))).unwrap();
    let mut call = task::spawn(diary.call("5".into()));
    assert_pending!(call.poll());
    assert_pending!(diary.enter(|cx, mut diary| diary.poll_ready(cx)));

    sleep(5 * SEC).await;
    assert!(call.is_woken());
    assert!(!diary.is_woken());
    assert_ready_eq!(call.poll().map(Result::unwrap), "()");

    assert!(diary.is_woken());
    assert_ready!(diary.enter(|cx, mut diary| diary.poll_ready(cx))).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_session_is_ready_again_when_a_call_is_dropped_before_or_during_its_work() {
    for polled in [false, true] {
        let mut diary = task::spawn(SessionService::new(Diary::default()));
        assert_ready!(diary.enter(|cx, mut diary| diary.poll_ready(cx))).unwrap();
        let mut call = task::spawn(diary.call("5".into()));
        if polled {
            assert_pending!(call.poll());
        }
        assert_pending!(diary.enter(|cx, mut diary| diary.poll_ready(cx)));

        drop(call);

        assert!(diary.is_woken());
        assert_ready!(diary.enter(|cx, mut diary| diary.poll_ready(cx))).unwrap();
        let answer = diary.call("a".into()).await.unwrap();
        assert_eq!(answer, if polled { "(a" } else { "a" });
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_did_not_wait_until_the_session_was_ready_waits_for_its_turn() {
    let mut diary = SessionService::new(Diary::default());
    let mut first = task::spawn(diary.call("5".into()));
    assert_pending!(first.poll());
    let mut second = task::spawn(diary.call("a".into()));
    assert_pending!(second.poll());

    sleep(5 * SEC).await;
    assert_ready_eq!(first.poll().map(Result::unwrap), "()");

    assert!(second.is_woken());
    assert_ready_eq!(second.poll().map(Result::unwrap), "()a");
}

#[tokio::test(start_paused = true)]
async fn a_session_whose_panic_was_caught_is_called_as_the_panic_left_it() {
    let mut diary = SessionService::new(Diary::default());
    assert_eq!(diary.call("a".into()).await.unwrap(), "a");

    let panicked = catch_unwind(AssertUnwindSafe(|| {
        diary.call("panic".into()).now_or_never()
    }));

    assert!(panicked.is_err());
    assert_eq!(diary.call("b".into()).await.unwrap(), "ab");
}

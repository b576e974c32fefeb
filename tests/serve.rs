//! The future of a server: on a multi-threaded runtime the accept loop runs in a task, whichever
//! thread awaits the future, and dropping the future still ends the server at once.

use std::convert::Infallible;
use std::future::{Future, pending, poll_fn, ready};
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll};
use std::thread::{self, ThreadId};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{Either, select};
use process::soon;
use tokio::io::{AsyncReadExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::{Instant, timeout};
use tower::service_fn;
use tower_tcp::bind::{Endpoint, Incoming, Listener, Socket};
use tower_tcp::testkit::memory;
use tower_tcp::{Address, BoxError, Connection, ConnectionService, Error, Serve, Server};
use tracing::{Instrument, Span, info_span};

#[path = "support/process.rs"]
mod process;

/// The limit of every wait, far longer than any of them takes.
const NET: Duration = Duration::from_secs(20);

fn workers() -> Runtime {
    let mut runtime = Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build();
    runtime.expect("threads can be had")
}

async fn bound(endpoint: impl Into<Endpoint>) -> (Server, SocketAddr) {
    let server = Server::bind(endpoint).await.expect("a port can be had");
    let addr = server.handle().local_addrs()[0].tcp();
    (server, addr.expect("it is one of TCP"))
}

/// A stack that runs `call` in the accept loop for each connection, and keeps the connection open.
fn calling(mut call: impl FnMut() + Send + 'static) -> impl ConnectionService<Socket> {
    service_fn(move |conn: Connection<Socket>| {
        call();
        async move {
            let _open = conn;
            pending::<Result<(), Infallible>>().await
        }
    })
}

/// Serves until the stack is called. Returns what `inside` returned in that call.
async fn in_a_call<T: Send + 'static>(inside: impl Fn() -> T + Send + 'static) -> T {
    let (server, addr) = bound("127.0.0.1:0").await;
    let (tell, told) = oneshot::channel();
    let mut tell = Some(tell);
    let stack = calling(move || {
        if let Some(tell) = tell.take() {
            let _sent = tell.send(inside());
        }
    });
    let visit = pin!(async {
        let _client = TcpStream::connect(addr).await.expect("it is accepted");
        told.await.expect("the stack is called")
    });
    match soon("a call", select(server.serve(stack), visit)).await {
        Either::Left((ended, _)) => panic!("{ended:?}"),
        Either::Right((told, _serve)) => told,
    }
}

/// Waits until the server has closed or reset the connection.
async fn end(mut client: TcpStream) {
    let read = soon("the end of the connection", client.read(&mut [0])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

fn here() -> ThreadId {
    thread::current().id()
}

#[test]
fn the_accept_loop_runs_on_a_worker_and_not_on_the_thread_that_awaits_it() {
    let called_on = workers().block_on(in_a_call(here));

    assert_ne!(called_on, here());
}

#[test]
fn the_accept_loop_stays_in_the_task_that_awaits_it() {
    let runtime = workers();
    let task = runtime.spawn(async { (tokio::task::id(), in_a_call(tokio::task::id).await) });

    let (task, called_in) = runtime.block_on(task).expect("it does not panic");

    assert_eq!(task, called_in);
}

#[test]
fn the_accept_loop_stays_on_the_thread_of_a_runtime_with_only_one() {
    let one = Builder::new_current_thread().enable_all().build();
    let inside = || (here(), tokio::task::try_id());

    let called_on = one.expect("it can be built").block_on(in_a_call(inside));

    assert_eq!(called_on, (here(), None));
}

#[test]
fn the_accept_loop_runs_on_a_worker_when_a_local_set_awaits_it() {
    let set = LocalSet::new();

    let called_on = workers().block_on(set.run_until(in_a_call(here)));

    assert_ne!(called_on, here());
}

#[test]
fn the_stack_is_called_in_the_span_around_the_future() {
    let subscriber = tracing_subscriber::registry();
    tracing::subscriber::set_global_default(subscriber).expect("it is the only one");
    let name = || Span::current().metadata().map(|metadata| metadata.name());

    let called_in = in_a_call(name).instrument(info_span!("around"));

    assert_eq!(workers().block_on(called_in), Some("around"));
}

#[test]
fn a_server_ends_when_the_runtime_on_which_it_was_bound_has_ended() {
    let elsewhere = workers();
    let server = elsewhere.block_on(Server::bind("127.0.0.1:0"));
    drop(elsewhere);
    let stack = service_fn(|_: Connection<Socket>| ready(Ok::<_, BoxError>(())));

    let serving = server.expect("a free port").serve(stack);
    let served = workers().block_on(async { timeout(NET, serving).await });

    let Err(Error::Accept(err)) = served.expect("it ends") else {
        panic!("it does not end in good order");
    };
    assert_eq!(
        err.to_string(),
        "the runtime on which the listener was bound was shut down"
    );
}

#[test]
fn a_dropped_future_has_closed_the_listener_and_ends_the_connections() {
    workers().block_on(async {
        let (mut server, addr) = bound("127.0.0.1:0").await;
        for _ in 0..200 {
            let handle = server.handle();
            let (tell, told) = oneshot::channel::<()>();
            let mut tell = Some(tell);
            let serve = server.serve(calling(move || drop(tell.take())));
            let visit = pin!(async {
                let client = TcpStream::connect(addr).await;
                let _called = told.await;
                client.expect("it is accepted")
            });
            let Either::Right((client, serve)) = soon("a call", select(serve, visit)).await else {
                panic!("the server does not end");
            };

            drop(serve);

            (server, _) = bound(addr).await;
            end(client).await;
            soon("the report", handle.closed()).await;
        }
    });
}

/// Connections that leave the table on other threads, while the report is made, count once.
#[test]
fn the_report_of_a_dropped_future_counts_each_connection_once() {
    const CLIENTS: usize = 100;
    workers().block_on(async {
        for round in 0..200 {
            let (listener, connector) = memory();
            let server = Server::from_listener(listener);
            let handle = server.handle();
            let stack = service_fn(|conn: Connection<DuplexStream>| async move {
                let _conn = conn;
                pending::<Result<(), BoxError>>().await
            });
            let mut serve = server.serve(stack);
            let mut clients = Vec::new();
            let connect = pin!(async {
                for _ in 0..CLIENTS {
                    clients.push(connector.connect().await.expect("it listens"));
                }
                while handle.live() < CLIENTS {
                    tokio::task::yield_now().await;
                }
            });
            let connected = soon("the connections", select(&mut serve, connect)).await;
            assert!(matches!(connected, Either::Right(_)), "it does not end");

            drop(serve);

            let report = soon("the report", handle.closed()).await;
            assert_eq!((report.drained, report.aborted), (0, CLIENTS), "{round}");
        }
    });
}

/// Polls a future once, outside a task.
async fn poll_once<F: Future + Unpin>(future: &mut F) {
    poll_fn(|cx| {
        assert!(Pin::new(&mut *future).poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
}

#[test]
fn a_stack_that_drops_its_own_server_ends_it_and_is_not_called_again() {
    let runtime = workers();
    let (server, addr) = runtime.block_on(bound("127.0.0.1:0"));
    let handle = server.handle();
    let clients = [(); 12].map(|()| std::net::TcpStream::connect(addr));
    let (give, given) = mpsc::sync_channel::<Serve>(1);
    let (took, taken) = mpsc::sync_channel(1);
    let calls = Arc::new(AtomicUsize::new(0));
    let called = Arc::clone(&calls);
    let stack = calling(move || {
        if called.fetch_add(1, Ordering::Relaxed) == 0 {
            let serve = given.recv_timeout(NET).expect("the test gives it");
            let begun = Instant::now();
            drop(serve);
            let _sent = took.send(begun.elapsed());
        }
    });
    let mut serve = server.serve(stack);
    runtime.block_on(poll_once(&mut serve));
    give.send(serve).expect("the stack waits for it");

    let ended = runtime.block_on(async { timeout(NET, handle.closed()).await });

    // A worker that is stuck in the stack must not keep the test from its end.
    runtime.shutdown_background();
    assert_eq!(ended.expect("it ends").aborted, 1);
    let taken = taken.recv_timeout(NET).expect("it was dropped");
    assert!(
        taken < Duration::from_millis(900),
        "it does not wait for itself"
    );
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    drop(clients);
}

#[test]
fn a_call_that_drops_the_output_of_a_task_may_drop_its_own_server_with_it() {
    let runtime = workers();
    let (server, addr) = runtime.block_on(bound("127.0.0.1:0"));
    let handle = server.handle();
    let (give, given) = mpsc::sync_channel::<JoinHandle<Serve>>(1);
    // While tokio drops the output, the current task is the one that returned it, not the server's.
    let stack = calling(move || drop(given.recv_timeout(NET)));
    runtime.block_on(async {
        let mut serve = server.serve(stack);
        poll_once(&mut serve).await;
        let task = tokio::spawn(ready(serve));
        while !task.is_finished() {
            tokio::task::yield_now().await;
        }
        give.send(task).expect("the stack waits for it");
    });
    let client = std::net::TcpStream::connect(addr);

    let ended = runtime.block_on(async { timeout(NET, handle.closed()).await });

    runtime.shutdown_background();
    assert!(ended.is_ok(), "the server has ended");
    drop(client);
}

#[test]
fn a_drop_does_not_wait_for_ever_for_a_call_that_waits_for_it() {
    let runtime = workers();
    let (server, addr) = runtime.block_on(bound("127.0.0.1:0"));
    let handle = server.handle();
    let lock = Arc::new(Mutex::new(()));
    let (tell, told) = mpsc::sync_channel(1);
    let taken = Arc::clone(&lock);
    let stack = calling(move || {
        tell.send(()).expect("the test waits");
        drop(taken.lock());
    });
    let mut serve = server.serve(stack);
    runtime.block_on(poll_once(&mut serve));
    let guard = lock.lock().expect("no panic");
    let client = std::net::TcpStream::connect(addr);
    told.recv_timeout(NET).expect("a call");

    drop(serve);

    drop(guard);
    let ended = runtime.block_on(async { timeout(NET, handle.closed()).await });
    assert!(ended.is_ok(), "the server has ended");
    drop((client, runtime.block_on(bound(addr))));
}

#[test]
fn a_drop_waits_for_a_call_in_progress_and_no_longer() {
    let runtime = workers();
    let (server, addr) = runtime.block_on(bound("127.0.0.1:0"));
    let (tell, told) = mpsc::sync_channel(1);
    let (release, released) = mpsc::sync_channel(1);
    let stack = calling(move || {
        tell.send(()).expect("the test waits");
        released.recv_timeout(NET).expect("the test goes on");
    });
    let mut serve = server.serve(stack);
    runtime.block_on(poll_once(&mut serve));
    let client = std::net::TcpStream::connect(addr);
    told.recv_timeout(NET).expect("a call");
    let (tell, dropped) = mpsc::sync_channel(1);
    thread::spawn(move || {
        drop(serve);
        tell.send(std::net::TcpListener::bind(addr).map(drop))
    });
    let early = dropped.recv_timeout(Duration::from_millis(50));
    assert!(early.is_err(), "the drop waits for the call: {early:?}");

    let begun = Instant::now();
    release.send(()).expect("the call waits");

    let bound = dropped.recv_timeout(NET).expect("the drop returns");
    assert!(begun.elapsed() < Duration::from_millis(900), "it is woken");
    bound.expect("the listener is closed");
    drop(client);
}

/// A listener with a fault.
struct Panics;

impl Listener for Panics {
    type Io = tokio::io::DuplexStream;

    fn poll_accept(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Self::Io>>> {
        panic!("of the listener")
    }

    fn local_addrs(&self) -> Vec<Address> {
        Vec::new()
    }
}

#[test]
fn a_panic_of_a_listener_reaches_the_caller() {
    let panics = async {
        let stack = service_fn(async |_: Connection<_>| Ok::<_, Infallible>(()));
        Server::from_listener(Panics).serve(stack).await
    };

    let caught = workers().block_on(AssertUnwindSafe(panics).catch_unwind());

    let payload = caught.expect_err("it panics");
    assert_eq!(payload.downcast_ref(), Some(&"of the listener"));
}

#[test]
fn a_server_whose_runtime_is_shut_down_ends_with_an_error() {
    let runtime = workers();
    let (server, addr) = runtime.block_on(bound("127.0.0.1:0"));
    let (tell, told) = mpsc::sync_channel(2);
    let (called, handle) = (tell.clone(), server.handle());
    let entered = runtime.handle().clone();
    thread::spawn(move || {
        let stack = calling(move || called.send(None).expect("the test waits"));
        let mut serve = server.serve(stack);
        let ended = entered.block_on(&mut serve);
        // The listener is closed and the report is there, although the future is not dropped yet.
        let closed = handle.closed().now_or_never().is_some();
        let free = std::net::TcpListener::bind(addr).is_ok();
        tell.send(Some((ended, closed, free)))
    });
    let client = std::net::TcpStream::connect(addr);
    assert!(told.recv_timeout(NET).expect("a call").is_none());

    runtime.shutdown_background();

    let (ended, closed, free) = told.recv_timeout(NET).expect("the end").expect("an end");
    assert!(matches!(ended, Err(Error::Workers(_))), "{ended:?}");
    assert!(closed && free);
    drop(client);
}

//! A server in memory that is ended in all the ways there are, and what became of its connections.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its own part"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use tower::{Service, ServiceBuilder};
use tower_tcp::bind::Listener;
use tower_tcp::testkit::{self, Connector};
use tower_tcp::{BoxError, Connection, EndReason, Error, Handle, Report, Server};

pub(crate) type Io = DuplexStream;

/// A server in memory, and the reasons its connections ended with.
pub(crate) struct Running {
    pub(crate) connector: Connector,
    pub(crate) handle: Handle,
    pub(crate) ends: Arc<Mutex<Vec<EndReason>>>,
    pub(crate) task: JoinHandle<Result<Report, Error>>,
}

pub(crate) fn start<S>(stack: S) -> Running
where
    S: Service<Connection<Io>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let (listener, connector) = testkit::memory();
    start_with(Server::from_listener(listener), connector, stack)
}

/// Starts a server that was built with options of its own.
pub(crate) fn start_with<L, S>(server: Server<L>, connector: Connector, stack: S) -> Running
where
    L: Listener<Io = Io>,
    S: Service<Connection<Io>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let ends = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ends);
    let stack = ServiceBuilder::new()
        .map_request(move |conn: Connection<Io>| {
            let seen = Arc::clone(&seen);
            conn.on_end(move |end| seen.lock().expect("not poisoned").push(end.reason()));
            conn
        })
        .service(stack);
    let handle = server.handle();
    let task = tokio::spawn(server.serve(stack));
    Running {
        connector,
        handle,
        ends,
        task,
    }
}

impl Running {
    pub(crate) async fn connect(&self) -> Io {
        self.connector.connect().await.expect("the server listens")
    }

    pub(crate) fn ends(&self) -> Vec<EndReason> {
        self.ends.lock().expect("not poisoned").clone()
    }

    /// Waits for the server's own end.
    pub(crate) async fn ended(&mut self) -> Result<Report, Error> {
        tokio::time::timeout(Duration::from_secs(3600), &mut self.task)
            .await
            .expect("the server ends")
            .expect("the server does not panic")
    }

    pub(crate) async fn report(&mut self) -> Report {
        self.ended().await.expect("the server ends in good order")
    }

    /// Sends everything and half-closes, and returns all that came back.
    pub(crate) async fn exchange(&self, requests: &str) -> String {
        let client = self.connect().await;
        exchange(client, requests).await
    }

    pub(crate) async fn all_gone(&self) {
        until(|| self.handle.live() == 0).await;
        assert_eq!(self.handle.limit().in_use(), 0);
    }
}

pub(crate) async fn exchange(mut client: Io, requests: &str) -> String {
    client
        .write_all(requests.as_bytes())
        .await
        .expect("the server reads");
    // The server may have closed already.
    drop(client.shutdown().await);
    read_to_end(client).await
}

pub(crate) async fn read_to_end(mut client: Io) -> String {
    let mut replies = String::new();
    let read = tokio::time::timeout(
        Duration::from_secs(3600),
        client.read_to_string(&mut replies),
    );
    read.await
        .expect("the server closes")
        .expect("replies are text");
    replies
}

/// On a paused clock: looks again whenever nothing else can run.
pub(crate) async fn until(mut fact: impl FnMut() -> bool) {
    for _ in 0..100_000 {
        if fact() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it never became true");
}

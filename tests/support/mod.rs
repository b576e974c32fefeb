//! A server in memory, and a client of it.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its own part"
)]

use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tower::{Service, ServiceBuilder};
use tower_tcp::bind::{Incoming, Listener};
use tower_tcp::pipeline::{InFlight, Multiplexed, PipelineFuture};
use tower_tcp::testkit::{Connector, memory};
use tower_tcp::{Address, BoxError, Connection, End, EndReason, Handle, Pipeline, Server};

/// The net under every wait: far beyond what any test waits for on the paused clock.
const NET: Duration = Duration::from_secs(24 * 3600);

/// A server at work. It reports how its connections end.
pub(crate) struct Served {
    /// The way of dispatch, for messages.
    pub(crate) way: &'static str,
    pub(crate) handle: Handle,
    ends: mpsc::Receiver<End>,
    connector: Option<Connector>,
}

impl Served {
    pub(crate) async fn connect(&self) -> Client<DuplexStream> {
        self.try_connect().await.expect("the server listens")
    }

    /// Connects, unless the server listens no more.
    pub(crate) async fn try_connect(&self) -> io::Result<Client<DuplexStream>> {
        let connector = self.connector.as_ref().expect("it is served in memory");
        connector.connect().await.map(Client::new)
    }

    /// Waits for the next end of a connection.
    pub(crate) async fn ended(&mut self) -> End {
        timeout(NET, self.ends.recv())
            .await
            .unwrap_or_else(|_| panic!("{}: no connection ended", self.way))
            .expect("the server runs")
    }

    /// Returns whether another connection has ended by now.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.ends.try_recv().is_ok()
    }

    /// Waits for the next end of a connection, and returns its reason.
    pub(crate) async fn reason(&mut self) -> EndReason {
        self.ended().await.reason()
    }
}

/// Serves connections made in memory.
pub(crate) fn serve<S>(stack: S) -> Served
where
    S: Service<Connection<DuplexStream>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let (listener, connector) = memory();
    let mut served = serve_on(Server::from_listener(listener), stack);
    served.connector = Some(connector);
    served
}

/// Serves whatever the server listens on.
pub(crate) fn serve_on<L, S>(server: Server<L>, stack: S) -> Served
where
    L: Listener,
    S: Service<Connection<L::Io>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let (report, ends) = mpsc::channel(4096);
    let stack = ServiceBuilder::new()
        .map_request(move |conn: Connection<L::Io>| {
            let report = report.clone();
            // Nobody reads along any more when the test is over.
            conn.on_end(move |end| drop(report.try_send(end.clone())));
            conn
        })
        .service(stack);
    let handle = server.handle();
    tokio::spawn(server.serve(stack));
    Served {
        way: "as it is",
        handle,
        ends,
        connector: None,
    }
}

/// Listens for the streams that are sent to it.
pub(crate) struct Streams<Io>(pub(crate) mpsc::Receiver<Io>);

impl<Io: Send + 'static> Listener for Streams<Io> {
    type Io = Io;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        match ready!(self.0.poll_recv(cx)) {
            Some(io) => Poll::Ready(Ok(Incoming {
                io,
                peer_addr: Address::Memory(1),
                local_addr: Address::Memory(0),
            })),
            None => Poll::Pending,
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        vec![Address::Memory(0)]
    }
}

/// Serves one stream.
pub(crate) fn serve_stream<Io, S>(io: Io, stack: S) -> Served
where
    Io: Send + 'static,
    S: Service<Connection<Io>, Error = BoxError> + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    let (streams, listener) = mpsc::channel(1);
    streams.try_send(io).expect("there is room for one");
    serve_on(Server::from_listener(Streams(listener)), stack)
}

/// Serves a pipeline in each of the three ways of dispatch, eight requests at a time where there may be several.
pub(crate) fn each_way<F, K, T>(pipeline: Pipeline<F, K, T>) -> [Served; 3]
where
    Pipeline<F, K, T>: Clone + Pipelined,
    Pipeline<F, K, T, InFlight>: Pipelined,
    Pipeline<F, K, T, Multiplexed>: Pipelined,
{
    let mut served = [
        serve(pipeline.clone()),
        serve(pipeline.clone().in_flight(8)),
        serve(pipeline.multiplexed(8)),
    ];
    served[0].way = "one at a time";
    served[1].way = "in flight";
    served[2].way = "multiplexed";
    served
}

/// Waits until nothing more happens unless paused time goes on.
pub(crate) async fn settled() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

/// A pipeline that serves connections in memory.
pub(crate) trait Pipelined:
    Service<
        Connection<DuplexStream>,
        Response = EndReason,
        Error = BoxError,
        Future = PipelineFuture,
    > + Send
    + 'static
{
}

impl<S> Pipelined for S where
    S: Service<
            Connection<DuplexStream>,
            Response = EndReason,
            Error = BoxError,
            Future = PipelineFuture,
        > + Send
        + 'static
{
}

/// A client that speaks lines.
pub(crate) struct Client<Io>(pub(crate) BufReader<Io>);

impl<Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Client<Io> {
    pub(crate) fn new(io: Io) -> Self {
        Self(BufReader::new(io))
    }

    pub(crate) async fn send(&mut self, text: impl AsRef<[u8]>) {
        timeout(NET, self.0.write_all(text.as_ref()))
            .await
            .expect("the server reads")
            .expect("the connection is open");
    }

    /// Finishes sending, and goes on reading.
    pub(crate) async fn finish(&mut self) {
        self.0.shutdown().await.expect("the connection is open");
    }

    /// Reads a line, and returns it without its end; at the end of the stream an empty one.
    pub(crate) async fn line(&mut self) -> String {
        let mut line = String::new();
        timeout(NET, self.0.read_line(&mut line))
            .await
            .expect("a line comes")
            .expect("the connection is open");
        line.truncate(line.trim_end().len());
        line
    }

    /// Sends a line, and reads one.
    pub(crate) async fn ask(&mut self, line: &str) -> String {
        self.send(format!("{line}\n")).await;
        self.line().await
    }

    /// Returns whether nothing comes within a second, not even the end. Only for the paused clock.
    pub(crate) async fn hears_nothing(&mut self) -> bool {
        let second = Duration::from_secs(1);
        timeout(second, self.0.fill_buf()).await.is_err()
    }

    /// Reads all lines up to the end of the stream.
    pub(crate) async fn rest(&mut self) -> Vec<String> {
        let mut rest = String::new();
        timeout(NET, self.0.read_to_string(&mut rest))
            .await
            .expect("the stream ends")
            .expect("the connection ends in good order");
        rest.lines().map(str::to_owned).collect()
    }
}

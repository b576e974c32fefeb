//! Shared by the tests of a served stack: a client of lines, waits for ends, and the three ways of
//! dispatch.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its own part"
)]

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tower::Service;
use tower_tcp::bind::{Incoming, Listener, Socket};
use tower_tcp::pipeline::{InFlight, Multiplexed, PipelineFuture};
use tower_tcp::testkit::{Connector, Served, memory, serve_with};
use tower_tcp::{
    Address, BoxError, Connection, ConnectionService, End, EndReason, Pipeline, Report, Server,
};

/// The limit of every wait, far longer than any test waits on the paused clock.
const NET: Duration = Duration::from_secs(24 * 3600);

/// Connects to a server in memory, which must be listening.
pub(crate) trait Clients {
    /// Connects.
    fn stream(&self) -> impl Future<Output = DuplexStream>;

    /// Connects a client of lines.
    fn client(&self) -> impl Future<Output = Client<DuplexStream>>;

    /// Sends everything and half-closes, and returns all that came back.
    fn exchange(&self, requests: &str) -> impl Future<Output = String>;
}

impl Clients for Served<Connector> {
    async fn stream(&self) -> DuplexStream {
        self.connect().await.expect("the server listens")
    }

    async fn client(&self) -> Client<DuplexStream> {
        Client::new(self.stream().await)
    }

    async fn exchange(&self, requests: &str) -> String {
        exchange(self.stream().await, requests).await
    }
}

/// Waits for ends of connections and of the server, which must come.
pub(crate) trait Ends {
    /// Returns the name of the dispatch, for messages of failed assertions.
    fn way(&self) -> &str;

    /// Waits for the next end of a connection.
    fn end(&self) -> impl Future<Output = End>;

    /// Waits for the next end of a connection, and returns its reason.
    fn reason(&self) -> impl Future<Output = EndReason>;

    /// Waits for the server to end in good order.
    fn report(&mut self) -> impl Future<Output = Report>;

    /// Waits until no connection is left, and no permit of the limit is taken.
    fn all_gone(&self) -> impl Future<Output = ()>;
}

impl<C> Ends for Served<C> {
    fn way(&self) -> &str {
        self.handle().name().unwrap_or("as it is")
    }

    async fn end(&self) -> End {
        let ended = self.ended().await;
        ended.unwrap_or_else(|err| panic!("{}: {err}", self.way()))
    }

    async fn reason(&self) -> EndReason {
        self.end().await.reason()
    }

    async fn report(&mut self) -> Report {
        self.closed().await.expect("the server ends in good order")
    }

    async fn all_gone(&self) {
        until(|| self.handle().live() == 0).await;
        assert_eq!(self.handle().limit().in_use(), 0);
    }
}

/// Listens for the streams that are sent to it.
pub(crate) struct Streams<Io>(pub(crate) mpsc::Receiver<Io>);

impl<Io: Send + 'static> Listener for Streams<Io> {
    type Io = Io;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        match ready!(self.0.poll_recv(cx)) {
            Some(io) => {
                let (peer, local) = (Address::Memory(1), Address::Memory(0));
                Poll::Ready(Ok(Incoming::new(io, peer, local)))
            }
            None => Poll::Pending,
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        vec![Address::Memory(0)]
    }
}

/// Serves one stream.
pub(crate) fn serve_stream<Io, S>(io: Io, stack: S) -> Served<()>
where
    Io: Send + 'static,
    S: Service<Connection<Io>, Error = BoxError> + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    let (streams, listener) = mpsc::channel(1);
    streams.try_send(io).expect("there is room for one");
    serve_with(Server::from_listener(Streams(listener)), (), stack)
}

/// Serves a pipeline in each of the three ways of dispatch, eight requests at a time where there
/// may be several.
pub(crate) fn each_way<F, K, T>(pipeline: Pipeline<F, K, T>) -> [Served; 3]
where
    Pipeline<F, K, T>: Clone + Pipelined,
    Pipeline<F, K, T, InFlight>: Pipelined,
    Pipeline<F, K, T, Multiplexed>: Pipelined,
{
    [
        serve_way("one at a time", pipeline.clone()),
        serve_way("in flight", pipeline.clone().in_flight(8)),
        serve_way("multiplexed", pipeline.multiplexed(8)),
    ]
}

/// Serves a pipeline by a server that is named after its way of dispatch.
fn serve_way(way: &str, pipeline: impl Pipelined) -> Served {
    let (listener, connector) = memory();
    let server = Server::builder().name(way).build(listener);
    serve_with(server, connector, pipeline)
}

/// Serves a pipeline over TCP in each of the three ways of dispatch, and returns the addresses,
/// too.
pub(crate) async fn each_way_over_tcp<F, K, T>(
    pipeline: Pipeline<F, K, T>,
    in_flight: usize,
) -> [(Served<()>, SocketAddr); 3]
where
    Pipeline<F, K, T>: ConnectionService<Socket> + Clone,
    Pipeline<F, K, T, InFlight>: ConnectionService<Socket>,
    Pipeline<F, K, T, Multiplexed>: ConnectionService<Socket>,
{
    [
        over_tcp("one at a time", pipeline.clone()).await,
        over_tcp("in flight", pipeline.clone().in_flight(in_flight)).await,
        over_tcp("multiplexed", pipeline.multiplexed(in_flight)).await,
    ]
}

/// Serves a stack over TCP by a server with this name, and returns the address, too.
pub(crate) async fn over_tcp(
    name: &str,
    stack: impl ConnectionService<Socket>,
) -> (Served<()>, SocketAddr) {
    let server = Server::builder().name(name).listen("127.0.0.1:0");
    let server = server.bind().await.expect("loopback is there");
    let address = server.handle().local_addrs()[0].tcp().expect("it is TCP");
    (serve_with(server, (), stack), address)
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

pub(crate) async fn exchange(mut client: DuplexStream, requests: &str) -> String {
    client
        .write_all(requests.as_bytes())
        .await
        .expect("the server reads");
    // The server may have closed already.
    drop(client.shutdown().await);
    read_to_end(client).await
}

pub(crate) async fn read_to_end(mut client: DuplexStream) -> String {
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

/// Waits until `fact` holds. On a paused clock, it looks again whenever nothing else can run.
pub(crate) async fn until(mut fact: impl FnMut() -> bool) {
    for _ in 0..100_000 {
        if fact() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it never became true");
}

/// Panics if `fact` holds, with a payload that panics as it is dropped.
pub(crate) fn panic_if(fact: bool) {
    struct Twice;

    impl Drop for Twice {
        fn drop(&mut self) {
            panic!("as the payload is dropped");
        }
    }

    if fact {
        std::panic::panic_any(Twice);
    }
}

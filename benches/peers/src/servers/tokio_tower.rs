//! Sends lines back with tokio-tower's pipeline server, over `Framed`.

mod accept;

use std::convert::Infallible;
use std::io;

use bytes::Bytes;
use tokio_tower::pipeline;
use tokio_util::codec::Framed;
use tower::service_fn;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> io::Result<()> {
    accept::serve(|stream| async {
        let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
        pipeline::Server::new(Framed::new(stream, Lines::default()), echo)
            .await
            .map_err(|err| io::Error::other(err.to_string()))
    })
    .await
}

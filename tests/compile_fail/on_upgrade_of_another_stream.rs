//! Upgrades to a service of the bare stream, which would lose its buffered bytes.

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Connection;
use tower_tcp::Pipeline;
use tower_tcp::Reply;
use tower_tcp::Server;
use tower_tcp::bind::Socket;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Upgrade;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let lines = service_fn(|line: Bytes| async move {
        Ok::<Upgrade<Bytes>, BoxError>(Reply::from(line).upgrade())
    });
    let raw = service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
    let pipeline = Pipeline::new(Lines::default).service(lines).on_upgrade(raw);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

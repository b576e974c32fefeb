//! Takes tokio's stream in place of a `Connection`.

use tokio::net::TcpStream;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Server;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let raw = service_fn(|stream: TcpStream| async move { Ok::<_, BoxError>(drop(stream)) });
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(raw).await?;
    Ok(())
}

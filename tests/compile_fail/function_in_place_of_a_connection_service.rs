//! Serves an `async fn`, which is no service by itself.

use tower_tcp::BoxError;
use tower_tcp::Connection;
use tower_tcp::Server;
use tower_tcp::bind::Socket;

async fn drop_it(conn: Connection<Socket>) -> Result<(), BoxError> {
    drop(conn);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(drop_it).await?;
    Ok(())
}

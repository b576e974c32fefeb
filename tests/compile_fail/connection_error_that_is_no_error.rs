//! Fails a connection with a type that is not a `std::error::Error`.

use tower::service_fn;
use tower_tcp::Connection;
use tower_tcp::Server;
use tower_tcp::bind::Socket;

#[derive(Debug)]
struct Refused;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let refuse = service_fn(|_: Connection<Socket>| async move { Err::<(), _>(Refused) });
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(refuse).await?;
    Ok(())
}

//! Gives a type that is no codec.

use std::convert::Infallible;

use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;

#[derive(Default)]
struct Octets;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|octet: u8| async move { Ok::<_, Infallible>(octet) });
    let pipeline = Pipeline::new(Octets::default).service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

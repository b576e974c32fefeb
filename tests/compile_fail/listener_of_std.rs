//! Gives a listener of `std` to `from_listener`.

use std::convert::Infallible;
use std::net::TcpListener;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let listener = TcpListener::bind("127.0.0.1:7000").expect("an address");
    let pipeline = Pipeline::new(Lines::default).service(echo);
    Server::from_listener(listener).serve(pipeline).await?;
    Ok(())
}

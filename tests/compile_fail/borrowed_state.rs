//! Lets a service borrow from the function that serves it.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let greeting = "hello, ".to_owned();
    let greet = service_fn(|line: Bytes| {
        let reply = Bytes::from([greeting.as_bytes(), &line].concat());
        async move { Ok::<_, Infallible>(reply) }
    });
    let pipeline = Pipeline::new(Lines::default).service(greet);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

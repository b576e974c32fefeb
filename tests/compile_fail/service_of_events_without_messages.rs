//! Passes a service of events to `make_service`, which expects one of requests.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Peer;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Event;

struct Tick;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let make = service_fn(|_: Peer<Bytes>| async move {
        Ok::<_, BoxError>(service_fn(|event: Event<Bytes, Tick>| async move {
            Ok::<_, Infallible>(match event {
                Event::Request(line) => line,
                Event::Message(Tick) => "tick".into(),
            })
        }))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

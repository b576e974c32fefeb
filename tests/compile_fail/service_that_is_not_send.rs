//! Keeps an `Rc` in the service.

use std::cell::Cell;
use std::convert::Infallible;
use std::rc::Rc;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let count = Rc::new(Cell::new(0));
    let counter = service_fn(move |line: Bytes| {
        count.set(count.get() + 1);
        async move { Ok::<_, Infallible>(line) }
    });
    let pipeline = Pipeline::new(Lines::default).service(counter);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

//! Passes a make-service that takes `()`, as for hyper, in place of a `Peer`.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let make = service_fn(|_: ()| async move {
        Ok::<_, Infallible>(service_fn(|line: Bytes| async move {
            Ok::<_, Infallible>(line)
        }))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

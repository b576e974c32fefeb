//! Puts an app of HTTP behind TLS, without `Http` around it.

use axum::Router;
use tower::ServiceBuilder;
use tower_tcp::Server;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::tls::Tls;

fn tls() -> Tls {
    unimplemented!()
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let app: Router = Router::new();
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(tls()))
        .service(app);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(stack).await?;
    Ok(())
}

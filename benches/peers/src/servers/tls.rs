//! Terminates TLS with this crate, and forwards the plain bytes to a backend.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, Server};

/// The size of a read in nginx and in haproxy.
const BUFFER: usize = 16 * 1024;

#[derive(Parser)]
struct Args {
    cert: PathBuf,
    key: PathBuf,
    backend: SocketAddr,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let Args { cert, key, backend } = Args::parse();
    let server = Server::bind("127.0.0.1:0").await?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    let proxy = service_fn(move |mut conn: Connection<_>| async move {
        let mut backend = TcpStream::connect(backend).await?;
        backend.set_nodelay(true)?;
        copy_bidirectional_with_sizes(&mut conn, &mut backend, BUFFER, BUFFER).await?;
        Ok::<_, io::Error>(())
    });
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(PreConnectLayer::new(
            Tls::builder().pem_files(cert, key).build()?,
        ))
        .map_err(BoxError::from)
        .service(proxy);
    server.serve(stack).await?;
    Ok(())
}

//! Sends lines back by hand, with no library between the lines and the socket. The other servers
//! are compared with this one.

mod accept;
mod by_hand;
mod rustls;

use std::env;
use std::path::Path;

use tokio_rustls::TlsAcceptor;
use tower_tcp::BoxError;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    if let [cert, key] = &args[..] {
        let acceptor = TlsAcceptor::from(rustls::rustls((Path::new(cert), Path::new(key)))?);
        let echo = |stream| {
            let handshake = acceptor.accept(stream);
            async { by_hand::echo(handshake.await?).await }
        };
        accept::serve(echo).await?;
    } else {
        accept::serve(by_hand::echo).await?;
    }
    Ok(())
}

//! Writes only the half of a codec that decodes.

use std::convert::Infallible;
use std::io;

use bytes::{Buf, BytesMut};
use tokio_util::codec::Decoder;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;

struct Octets;

impl Decoder for Octets {
    type Item = u8;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<u8>> {
        Ok((!src.is_empty()).then(|| src.get_u8()))
    }
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|octet: u8| async move { Ok::<_, Infallible>(octet) });
    let pipeline = Pipeline::new(|| Octets).service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

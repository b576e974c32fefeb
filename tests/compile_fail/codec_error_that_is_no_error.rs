//! Makes a codec that fails with a type that is no `std::error::Error`.

use std::convert::Infallible;
use std::io;

use bytes::{Buf, BufMut, BytesMut};
use tokio_util::codec::{Decoder, Encoder};
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;

#[derive(Debug)]
enum Broken {
    Io,
}

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

struct Octets;

impl Decoder for Octets {
    type Item = u8;
    type Error = Broken;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<u8>, Broken> {
        Ok((!src.is_empty()).then(|| src.get_u8()))
    }
}

impl Encoder<u8> for Octets {
    type Error = Broken;

    fn encode(&mut self, item: u8, dst: &mut BytesMut) -> Result<(), Broken> {
        dst.put_u8(item);
        Ok(())
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

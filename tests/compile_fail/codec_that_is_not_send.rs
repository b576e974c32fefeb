//! Makes a codec that holds an `Rc`.

use std::convert::Infallible;
use std::io;
use std::rc::Rc;

use bytes::{Buf, BufMut, BytesMut};
use tokio_util::codec::{Decoder, Encoder};
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;

#[derive(Default)]
struct Octets {
    seen: Rc<u64>,
}

impl Decoder for Octets {
    type Item = u8;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<u8>> {
        Ok((!src.is_empty()).then(|| src.get_u8()))
    }
}

impl Encoder<u8> for Octets {
    type Error = io::Error;

    fn encode(&mut self, item: u8, dst: &mut BytesMut) -> io::Result<()> {
        dst.put_u8(item);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|octet: u8| async move { Ok::<_, Infallible>(octet) });
    let pipeline = Pipeline::new(Octets::default).service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

//! Tests a node without NATS under every fault of a member's connection.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use tokio::io::{AsyncRead, AsyncWrite, join, split};
use tokio_util::io::{ReaderStream, StreamReader};
use tower_tcp::EndReason;
use tower_tcp::testkit::faults;

use rooms::Rooms;

#[path = "../src/member.rs"]
mod member;
#[path = "../src/rooms.rs"]
#[expect(dead_code, reason = "nobody is told that the node leaves")]
mod rooms;
#[path = "../src/service.rs"]
mod service;

/// Removes the digits from everything that is read, because a member's name ends with the number of
/// its connection.
fn nameless<Io>(io: Io) -> impl AsyncRead + AsyncWrite + Unpin
where
    Io: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (reader, writer) = split(io);
    let nameless = ReaderStream::new(reader).map_ok(|bytes| {
        let others = bytes.into_iter().filter(|byte| !byte.is_ascii_digit());
        others.collect::<Bytes>()
    });
    join(StreamReader::new(nameless), writer)
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_every_byte_leaves_whole_lines() {
    let rooms = Arc::new(Rooms::open(None).await.unwrap());
    let input = "hi\n/join tea\nhello\n/who\n/join a b\n/join attic\nhi\n/quit\n";
    let output = "* you are in no room; say /join ROOM\n\
        * you are node- in tea\n\
        <node-> hello\n\
        * /join ROOM, /quit; the rest is said there\n\
        * a room is named by  to  letters and digits\n\
        * you are node- in attic\n\
        <node-> hi\n\
        * bye\n";
    let chat = Arc::clone(&rooms);

    let check = faults::check(
        move || service::chat(Arc::clone(&chat), "node".into()),
        input,
        output,
    );
    let farewells = EndReason::ALL
        .iter()
        .map(|reason| member::farewell(*reason));
    let check = farewells.fold(check, |check, farewell| {
        check.farewell([&farewell[..], b"\n"].concat())
    });
    let check = check.client(|io| async { Ok(nameless(io)) });
    check.await.unwrap();
}

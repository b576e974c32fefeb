//! The session of one connection.

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;

use bytes::Bytes;
use tower_tcp::pipeline::Session;
use tower_tcp::{EndReason, Peer, Reply};

use crate::rooms::Rooms;

/// The maximum length of the name of a room.
const MAX_NAME: usize = 20;

pub(crate) struct Member {
    rooms: Arc<Rooms>,
    peer: Peer<Bytes>,
    name: String,
    room: Option<String>,
}

impl Session<Bytes> for Member {
    type Reply = Reply<Bytes>;
    type Error = Infallible;

    async fn call(&mut self, line: Bytes) -> Result<Reply<Bytes>, Infallible> {
        // Control characters could affect the terminals of others.
        let line = String::from_utf8_lossy(&line).replace(char::is_control, "\u{fffd}");
        Ok(match line.split_once(' ') {
            Some(("/join", room)) => self.join(room).await,
            None if line == "/quit" => answer("* bye").close(),
            _ if line.starts_with('/') => answer("* /join ROOM, /quit; the rest is said there"),
            _ => self.say(&line).await,
        })
    }
}

impl Member {
    pub(crate) async fn begin(
        rooms: Arc<Rooms>,
        node: Arc<str>,
        peer: Peer<Bytes>,
    ) -> Result<Self, Infallible> {
        rooms.enter(&peer);
        let name = format!("{node}-{}", peer.info().id().get());
        Ok(Self {
            rooms,
            peer,
            name,
            room: None,
        })
    }

    async fn join(&mut self, room: &str) -> Reply<Bytes> {
        // Some other characters have a special meaning in a subject of NATS.
        let plain = room.chars().all(|c| c.is_ascii_alphanumeric());
        if !plain || room.is_empty() || room.len() > MAX_NAME {
            return answer(format!(
                "* a room is named by 1 to {MAX_NAME} letters and digits"
            ));
        }
        if let Some(before) = self.room.take() {
            self.rooms.leave(&before, &self.peer);
        }
        match self.rooms.join(room, &self.peer).await {
            Ok(()) => {
                self.room = Some(room.to_owned());
                answer(format!("* you are {} in {room}", self.name))
            }
            Err(err) => answer(format!("* not joined: {}", causes(&err))),
        }
    }

    async fn say(&self, line: &str) -> Reply<Bytes> {
        let Some(room) = &self.room else {
            return answer("* you are in no room; say /join ROOM");
        };
        let line = format!("<{}> {line}", self.name);
        match self.rooms.say(room, line).await {
            Ok(()) => Reply::none(),
            Err(why) => answer(why),
        }
    }
}

/// Returns the last line to a member whose connection the server ends.
pub(crate) fn farewell(reason: EndReason) -> Bytes {
    match reason {
        EndReason::Drained => "* bye: this node has left".into(),
        other => format!("* bye: {}", other.as_str().replace('_', " ")).into(),
    }
}

fn answer(line: impl Into<Bytes>) -> Reply<Bytes> {
    line.into().into()
}

/// Returns an error with its causes, in one line.
fn causes(err: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(err), |&err| err.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

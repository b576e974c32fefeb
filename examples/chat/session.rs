//! The session of one connection: the commands of its member, and the messages to it.

use std::borrow::Cow;
use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use tower_tcp::pipeline::{Event, Session};
use tower_tcp::{BoxError, EndReason, Reply};

use crate::rooms::{Chat, Name, Place};

const HELP: &str = "* /join ROOM, /rooms, /who, /msg NAME TEXT, /kick NAME, /quit";

/// A message to a session, besides the lines of its member.
pub(crate) enum Message {
    /// Another member kicks this one.
    Kicked { by: Name },
}

pub(crate) type Peer = tower_tcp::Peer<Bytes, Message>;

/// The session of one connection, which is a member of the chat once it has entered a name.
pub(crate) struct Member {
    chat: Arc<Chat>,
    peer: Peer,
    name: Option<Name>,
    place: Option<Place>,
}

impl Session<Event<Bytes, Message>> for Member {
    type Reply = Reply<Bytes>;
    type Error = Infallible;

    async fn call(&mut self, event: Event<Bytes, Message>) -> Result<Reply<Bytes>, Infallible> {
        Ok(match event {
            Event::Request(line) => {
                let answer = self.line(&printable(&line)).await;
                answer.unwrap_or_else(|no| Bytes::from(format!("* {no}")).into())
            }
            Event::Message(Message::Kicked { by }) => self.close(format!("kicked by {by}")),
        })
    }
}

/// Tells the room why the connection closes, whatever the reason. The registries remove the name
/// and the seat by themselves.
impl Drop for Member {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            let (chat, peer) = (Arc::clone(&self.chat), self.peer.clone());
            tokio::spawn(async move {
                let end = peer.closing().await;
                let why = match end.error() {
                    Some(why) if end.reason() == EndReason::ServiceClosed => why.to_string(),
                    _ => words(end.reason()),
                };
                chat.leave(place, &format!("left: {why}")).await;
            });
        }
    }
}

impl Member {
    pub(crate) async fn begin(chat: Arc<Chat>, peer: Peer) -> Result<Self, BoxError> {
        peer.send("* welcome! what is your name?".into()).await?;
        Ok(Self {
            chat,
            peer,
            name: None,
            place: None,
        })
    }

    /// Runs a command, or says a line in the room. An error is a reply to the member.
    async fn line(&mut self, line: &str) -> Result<Reply<Bytes>, String> {
        let Some(me) = self.name.clone() else {
            return self.enter(line).map(answer);
        };
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "/join" => self.join(me, Name::new(rest)?).await.map(answer),
            "/rooms" => Ok(answer(self.chat.list())),
            "/who" => {
                let Place { name, room, .. } = self.place()?;
                let names: Vec<_> = room
                    .seats()
                    .into_iter()
                    .map(|seat| seat.name.to_string())
                    .collect();
                Ok(answer(format!("* in {name}: {}", names.join(" "))))
            }
            "/msg" => {
                let (to, text) = rest.split_once(' ').ok_or("say /msg NAME TEXT")?;
                let line = format!("<{me} to you> {text}");
                let peer = self.chat.member(&Name::new(to)?)?;
                let sent = peer.offer(line.into()).await;
                sent.map_err(|_slow| format!("{to} does not keep up and has not got that"))?;
                Ok(Reply::none())
            }
            "/kick" => self.kick(me, &Name::new(rest)?).map(answer),
            "/quit" => Ok(self.close("quit".into())),
            "/help" => Ok(answer(HELP.into())),
            _ if line.starts_with('/') => Err("there is no such command; /help lists them".into()),
            _ => {
                let Place { room, seat, .. } = self.place()?;
                room.say(format!("<{me}> {line}"), seat).await;
                Ok(Reply::none())
            }
        }
    }

    fn enter(&mut self, line: &str) -> Result<String, String> {
        let name = Name::new(line)?;
        let entered = self.chat.names.insert(name.clone(), &self.peer);
        entered.map_err(|_taken| format!("{name} is taken; what else?"))?;
        self.name = Some(name.clone());
        Ok(format!("* hello {name}; /help lists the commands"))
    }

    async fn join(&mut self, me: Name, name: Name) -> Result<String, String> {
        let welcome = format!("* you are in {name}");
        if self.place().is_ok_and(|here| here.name == name) {
            return Ok(welcome);
        }
        let joined = format!("* {me} joined");
        let place = self.chat.seat(name.clone(), me, &self.peer)?;
        if let Some(before) = self.place.replace(place.clone()) {
            self.chat.leave(before, &format!("went to {name}")).await;
        }
        place.room.say(joined, &place.seat).await;
        Ok(welcome)
    }

    fn kick(&self, me: Name, whom: &Name) -> Result<String, String> {
        let peer = self.chat.member(whom)?;
        if !self.chat.is_admin(&me) {
            let Place { name, room, seat } = self.place()?;
            let seats = room.seats();
            if seats.first() != Some(seat) || seats.iter().all(|seat| seat.name != *whom) {
                return Err(format!(
                    "only the member who has been in {name} for longest can kick"
                ));
            }
        }
        // If the queue is full, it already contains another kick.
        let _told_or_going = peer.try_post(Message::Kicked { by: me });
        Ok(format!("* you have kicked {whom}"))
    }

    fn close(&self, why: String) -> Reply<Bytes> {
        let bye = answer(format!("* bye: {why}"));
        // `why` also reaches the room and the log.
        self.peer.close_because(why);
        bye
    }

    fn place(&self) -> Result<&Place, String> {
        let place = self.place.as_ref();
        place.ok_or_else(|| "you are in no room; say /join ROOM".into())
    }
}

/// Returns the last line to a member whose connection the server ends.
pub(crate) fn farewell(reason: EndReason) -> Bytes {
    format!("* bye: {}", words(reason)).into()
}

fn words(reason: EndReason) -> String {
    match reason {
        EndReason::IdleTimeout | EndReason::FirstByteTimeout => "silent for too long".into(),
        EndReason::Drained => "the server shuts down".into(),
        other => other.as_str().replace('_', " "),
    }
}

fn answer(line: String) -> Reply<Bytes> {
    Bytes::from(line).into()
}

/// Returns a line as text that is harmless to the terminals of others. Control characters, and
/// characters that change the direction of text, are replaced.
fn printable(line: &[u8]) -> Cow<'_, str> {
    let harmful = |c: char| {
        let turns = matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        );
        c.is_control() || turns
    };
    let text = String::from_utf8_lossy(line);
    match text.contains(harmful) {
        true => text.replace(harmful, "\u{fffd}").into(),
        false => text,
    }
}

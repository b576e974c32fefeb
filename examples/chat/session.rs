//! The service of one connection: what its member says, and what it is told.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tower_tcp::pipeline::Event;
use tower_tcp::{BoxError, End, EndReason, Reply};

use crate::rooms::{Chat, Name, Place};

const HELP: &str = "* /join ROOM, /rooms, /who, /msg NAME TEXT, /kick NAME, /quit";

/// What a session is told besides the lines of its member.
pub(crate) enum Message {
    /// Its time to be silent may be over.
    Idle,
    /// A member has sent it away.
    Kicked { by: Name },
}

pub(crate) type Peer = tower_tcp::Peer<Bytes, Message>;

/// One connection, which becomes a member when it has given its name.
pub(crate) struct Session {
    chat: Arc<Chat>,
    peer: Peer,
    /// How long its member may be silent.
    idle: Duration,
    state: Mutex<State>,
}

struct State {
    name: Option<Name>,
    place: Option<Place>,
    heard: Instant,
}

impl Session {
    pub(crate) async fn begin(
        chat: Arc<Chat>,
        peer: Peer,
        idle: Duration,
    ) -> Result<Arc<Self>, BoxError> {
        peer.send("* welcome! what is your name?".into()).await?;
        let _runs_until_the_end = peer.post_after(idle, Message::Idle);
        let state = Mutex::new(State {
            name: None,
            place: None,
            heard: Instant::now(),
        });
        let session = Arc::new(Self {
            chat,
            peer,
            idle,
            state,
        });
        let ending = Arc::clone(&session);
        session.peer.on_end(move |end| ending.end(end));
        Ok(session)
    }

    pub(crate) async fn event(&self, event: Event<Bytes, Message>) -> Reply<Bytes> {
        match event {
            Event::Request(line) => {
                self.state().heard = Instant::now();
                let answer = self.line(&printable(&line)).await;
                answer.unwrap_or_else(|no| Bytes::from(format!("* {no}")).into())
            }
            Event::Message(Message::Idle) => {
                // One timer for the whole connection: when it is due, it is set again for the rest.
                let rest = self.idle.saturating_sub(self.state().heard.elapsed());
                if rest.is_zero() {
                    return self.farewell("silent for too long".into());
                }
                let _runs_until_the_end = self.peer.post_after(rest, Message::Idle);
                Reply::none()
            }
            Event::Message(Message::Kicked { by }) => self.farewell(format!("kicked by {by}")),
        }
    }

    /// Does what a line says; the error is for who has sent it.
    async fn line(&self, line: &str) -> Result<Reply<Bytes>, String> {
        let Some(me) = self.name() else {
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
            "/quit" => Ok(self.farewell("quit".into())),
            "/help" => Ok(answer(HELP.into())),
            _ if line.starts_with('/') => Err("there is no such command; /help lists them".into()),
            _ => {
                let Place { room, seat, .. } = self.place()?;
                room.say(format!("<{me}> {line}"), &seat).await;
                Ok(Reply::none())
            }
        }
    }

    fn enter(&self, line: &str) -> Result<String, String> {
        let name = Name::new(line)?;
        let entered = self.chat.names.insert(name.clone(), &self.peer);
        entered.map_err(|_taken| format!("{name} is taken; what else?"))?;
        self.state().name = Some(name.clone());
        Ok(format!("* hello {name}; /help lists the commands"))
    }

    async fn join(&self, me: Name, name: Name) -> Result<String, String> {
        let welcome = format!("* you are in {name}");
        if self.place().is_ok_and(|here| here.name == name) {
            return Ok(welcome);
        }
        let joined = format!("* {me} joined");
        let place = self.chat.seat(name.clone(), me, &self.peer)?;
        let before = self.state().place.replace(place.clone());
        if let Some(before) = before {
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
            if seats.first() != Some(&seat) || seats.iter().all(|seat| seat.name != *whom) {
                return Err(format!(
                    "only who is in {name} for longest kicks from there"
                ));
            }
        }
        // No room for it is as well: then there is another kick on its way.
        let _told_or_going = peer.try_post(Message::Kicked { by: me });
        Ok(format!("* you have kicked {whom}"))
    }

    fn farewell(&self, why: String) -> Reply<Bytes> {
        let bye = answer(format!("* bye: {why}"));
        // The room hears of it at the end, and so does the log.
        self.peer.close_because(why);
        bye
    }

    /// Gives up all that it has, and tells the room why, whatever the end was.
    fn end(&self, end: &End) {
        let why = match end.error() {
            Some(why) if end.reason() == EndReason::ServiceClosed => why.to_string(),
            _ => end.reason().as_str().replace('_', " "),
        };
        let mut state = self.state();
        // The registry would do this by itself, but later: nobody who hears of the end shall find the name taken.
        let name = state.name.take();
        name.and_then(|name| self.chat.names.remove(&name));
        if let Some(place) = state.place.take() {
            let chat = Arc::clone(&self.chat);
            // This runs in the task of the connection that has ended, and cannot wait there.
            tokio::spawn(async move { chat.leave(place, &format!("left: {why}")).await });
        }
    }

    fn name(&self) -> Option<Name> {
        self.state().name.clone()
    }

    fn place(&self) -> Result<Place, String> {
        let place = self.state().place.clone();
        place.ok_or_else(|| "you are in no room; say /join ROOM".into())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn answer(line: String) -> Reply<Bytes> {
    Bytes::from(line).into()
}

/// Returns a line as text that does nothing to the terminals of others: no control characters, nothing that turns its direction.
fn printable(line: &[u8]) -> String {
    let harmful = |c: char| {
        let turns = matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        );
        c.is_control() || turns
    };
    String::from_utf8_lossy(line).replace(harmful, "\u{fffd}")
}

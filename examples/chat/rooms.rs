//! The registries: one of all names, and one for each room.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tower_tcp::registry::{Registry, SlowPeer};

use crate::session::{Message, Peer};

/// The maximum length of the name of a member or a room. A terminal line with two such names still
/// has room for text.
const MAX_NAME: usize = 20;
/// The maximum number of rooms. The list that `/rooms` prints stays readable.
const MAX_ROOMS: usize = 100;

/// The name of a member or a room. Few characters are allowed, so that no name can be mistaken for
/// another or for words of the server.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name(Arc<str>);

impl Name {
    pub(crate) fn new(name: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if (1..=MAX_NAME).contains(&name.len()) && name.chars().all(allowed) {
            Ok(Self(name.into()))
        } else {
            Err(format!(
                "a name is of 1 to {MAX_NAME} letters, digits, - and _"
            ))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The state that all sessions share.
pub(crate) struct Chat {
    pub(crate) names: Registry<Name, Bytes, Message>,
    rooms: Mutex<BTreeMap<Name, Room>>,
    admins: Vec<Name>,
    patience: Duration,
}

/// The members of a room. The room exists as long as it has a member.
#[derive(Clone)]
pub(crate) struct Room {
    members: Registry<Seat, Bytes, Message>,
    /// The time after which a member that reads nothing is disconnected.
    patience: Duration,
    /// The number of the next seat.
    next: u64,
}

/// A place in a room. Seats are numbered as they are taken, so the member with the lowest number
/// has been there longest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Seat {
    number: u64,
    pub(crate) name: Name,
}

impl Room {
    fn new(patience: Duration) -> Self {
        Self {
            members: Registry::new(),
            patience,
            next: 0,
        }
    }

    /// Returns the members in the order in which they came.
    pub(crate) fn seats(&self) -> Vec<Seat> {
        let mut seats: Vec<_> = self.members.iter().map(|(seat, _)| seat).collect();
        seats.sort();
        seats
    }

    /// Sends a line to all members but one, and waits for no slow reader. A member that reads too
    /// slowly misses the line, and a member that reads nothing is disconnected.
    pub(crate) async fn say(&self, line: String, but: &Seat) {
        let others = |seat: &Seat, _: &Peer| seat != but;
        self.members
            .broadcast(line.into(), others, SlowPeer::CloseAfter(self.patience))
            .await;
    }
}

/// The room that a member is in, and the member's seat there.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) name: Name,
    pub(crate) room: Room,
    pub(crate) seat: Seat,
}

impl Chat {
    pub(crate) fn new(admins: Vec<Name>, patience: Duration) -> Self {
        Self {
            names: Registry::new(),
            rooms: Mutex::default(),
            admins,
            patience,
        }
    }

    pub(crate) fn is_admin(&self, name: &Name) -> bool {
        self.admins.contains(name)
    }

    pub(crate) fn member(&self, name: &Name) -> Result<Peer, String> {
        let peer = self.names.get(name);
        peer.ok_or_else(|| format!("there is no {name}"))
    }

    pub(crate) fn list(&self) -> String {
        let rooms = self.rooms();
        let rooms = rooms
            .iter()
            .map(|(name, room)| format!(" {name} ({})", room.members.len()));
        format!("* rooms:{}", rooms.collect::<String>())
    }

    /// Gives a member a seat in a room, and creates the room if it does not exist.
    pub(crate) fn seat(&self, name: Name, member: Name, peer: &Peer) -> Result<Place, String> {
        let mut rooms = self.rooms();
        if rooms.len() == MAX_ROOMS && !rooms.contains_key(&name) {
            return Err(format!(
                "there are {MAX_ROOMS} rooms already; join one of them"
            ));
        }
        let room = rooms
            .entry(name.clone())
            .or_insert_with(|| Room::new(self.patience));
        let seat = Seat {
            number: room.next,
            name: member,
        };
        room.next += 1;
        let seated = room.members.insert(seat.clone(), peer);
        seated.expect("a number is given once");
        let room = room.clone();
        Ok(Place { name, room, seat })
    }

    /// Gives up a seat, and removes the room if that was the last seat. Tells the other members how
    /// the member left.
    pub(crate) async fn leave(&self, Place { name, room, seat }: Place, how: &str) {
        {
            // Under the lock, so that nobody takes a seat in a room that is being removed.
            let mut rooms = self.rooms();
            room.members.remove(&seat);
            if room.members.is_empty() {
                rooms.remove(&name);
            }
        }
        room.say(format!("* {} {how}", seat.name), &seat).await;
    }

    fn rooms(&self) -> MutexGuard<'_, BTreeMap<Name, Room>> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Changes that an operator makes to the running server.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tower_tcp::admit::Bans;
use tower_tcp::health::Health;
use tower_tcp::http::hyper::StatusCode;
use tower_tcp::replace::Replace;
use tower_tcp::{Address, Handle, LiveConnection};

/// The reason why an action was not done, with the status of the answer.
type Refusal = (StatusCode, String);

#[derive(Clone)]
pub(crate) struct Actions {
    pub(crate) server: Handle,
    /// The handle of the admin listener's own server.
    pub(crate) admin: Handle,
    pub(crate) bans: Bans,
}

impl Actions {
    /// Does what the segments of a path say. Returns the health of the server afterwards.
    pub(crate) async fn act(&self, path: &[&str]) -> Result<String, Refusal> {
        let server = &self.server;
        match *path {
            ["pause"] => server.pause(),
            ["resume"] => server.resume(),
            ["limit", "none"] => server.limit().set_unlimited(),
            ["limit", n] => server.limit().set(number(n)?),
            ["lame-duck"] => server.lame_duck(),
            ["drain"] => server.drain(),
            ["connections", id, "close"] => self.connection(id)?.close(),
            ["connections", id, "abort"] => self.connection(id)?.abort(),
            ["bans", address, "lift"] => self.bans.lift(&ip(address)?),
            ["bans", address, seconds] => self.ban(&ip(address)?, number(seconds)?),
            ["replace"] => return self.replace().await,
            _ => return Err((StatusCode::NOT_FOUND, "no such action".to_owned())),
        }
        Ok(Health::of(server).to_string())
    }

    fn connection(&self, id: &str) -> Result<LiveConnection, Refusal> {
        let id: u64 = number(id)?;
        let found = self.server.connections().find(|live| live.id().get() == id);
        found.ok_or_else(|| (StatusCode::NOT_FOUND, "no such connection".to_owned()))
    }

    /// Bans an address. A ban denies new connections, so the open ones are aborted here.
    fn ban(&self, address: &Address, seconds: u64) {
        self.bans.ban(address, Duration::from_secs(seconds));
        self.server
            .connections()
            .filter(|live| self.bans.is_banned(live.client_addr()))
            .for_each(|live| live.abort());
    }

    /// Replaces this process. The new one gets the sockets of both servers, so the admin pages are
    /// those of the new process from then on.
    async fn replace(&self) -> Result<String, Refusal> {
        let replace = Replace::new(&self.server).and(&self.admin);
        match replace.run().await {
            Ok(pid) => Ok(format!("replaced by process {pid}")),
            // The log has its causes.
            Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
        }
    }
}

fn number<N: std::str::FromStr>(text: &str) -> Result<N, Refusal> {
    text.parse()
        .map_err(|_error| (StatusCode::BAD_REQUEST, format!("{text}: not a number")))
}

fn ip(text: &str) -> Result<Address, Refusal> {
    let ip: Result<IpAddr, _> = text.parse();
    ip.map(|ip| Address::from(SocketAddr::new(ip, 0)))
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("{text}: {error}")))
}

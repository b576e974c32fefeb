//! Changes that an operator makes to the running server.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tower_tcp::admit::{AccessList, AccessRules, Bans, Verdict};
use tower_tcp::health::Health;
use tower_tcp::http::hyper::StatusCode;
use tower_tcp::replace::Replace;
use tower_tcp::{Address, BoxError, Handle, LiveConnection};

/// The status of the answer to a failed action, and the reason why it failed.
type Refusal = (StatusCode, String);

#[derive(Clone)]
pub(crate) struct Actions {
    pub(crate) server: Handle,
    /// The handles of the other two servers: the admin pages and the agent check.
    pub(crate) admin: Handle,
    pub(crate) agent: Handle,
    pub(crate) bans: Bans,
    pub(crate) denied: AccessList,
    /// The file from which `denied` is read, if there is one.
    pub(crate) deny: Option<PathBuf>,
}

impl Actions {
    /// Performs the action that is given by the segments of a path. Returns the text of the answer:
    /// for most actions, the health of the server afterwards.
    pub(crate) async fn act(&self, path: &[&str]) -> Result<String, Refusal> {
        let server = &self.server;
        match *path {
            ["pause"] => server.pause(),
            ["suspend"] => server.suspend(),
            ["resume"] => server.resume(),
            ["limit", "none"] => server.limit().set_unlimited(),
            ["limit", n] => server.limit().set(number(n)?),
            ["lame-duck"] => server.lame_duck(),
            ["drain"] => server.drain(),
            ["connections", id, "close"] => self.connection(id)?.close(),
            ["connections", id, "abort"] => self.connection(id)?.abort(),
            ["bans", address, "lift"] => self.bans.lift(&ip(address)?),
            ["bans", address, seconds] => self.ban(&ip(address)?, number(seconds)?),
            ["reload"] => self.reload().await?,
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

    fn ban(&self, address: &Address, seconds: u64) {
        self.bans.ban(address, Duration::from_secs(seconds));
        self.abort_if(|address| self.bans.is_banned(address));
    }

    /// Reads the list of denied networks again. If that fails, the previous list stays in effect.
    async fn reload(&self) -> Result<(), Refusal> {
        let Some(file) = self.deny.clone() else {
            return Err((StatusCode::NOT_FOUND, "there is no --deny file".to_owned()));
        };
        // Loading a long list takes a while. Connections are served meanwhile.
        let loaded = spawn_blocking(move || load(&file)).await;
        let rules = loaded.map_err(BoxError::from).and_then(|rules| rules);
        let rules = rules.map_err(|err| {
            let said = format!("nothing was reloaded: {err}");
            (StatusCode::INTERNAL_SERVER_ERROR, said)
        })?;
        self.denied.replace(rules);
        self.abort_if(|address| self.denied.verdict(address) == Verdict::Deny);
        Ok(())
    }

    /// Aborts the open connections of clients for which `is_denied` returns `true`. By itself, a
    /// ban or a list denies only new connections.
    fn abort_if(&self, is_denied: impl Fn(&Address) -> bool) {
        self.server
            .connections()
            .filter(|live| is_denied(live.client_addr()))
            .for_each(|live| live.abort());
    }

    /// Replaces this process. The new process gets the sockets of all three servers, so from then
    /// on the admin pages are those of the new process.
    async fn replace(&self) -> Result<String, Refusal> {
        let replace = Replace::new(&self.server).and(&self.admin).and(&self.agent);
        match replace.run().await {
            Ok(pid) => Ok(format!("replaced by process {pid}")),
            // The causes of the error are in the log.
            Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
        }
    }
}

/// Returns rules that deny the networks in a file, which has one network per line.
pub(crate) fn load(file: &Path) -> Result<AccessRules, BoxError> {
    let networks = std::fs::read_to_string(file)?.parse()?;
    Ok(AccessRules::new().deny(networks))
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

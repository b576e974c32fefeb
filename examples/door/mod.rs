//! The flags `--proxy-from`, `--per-client` and `--deny`, which several examples share.

use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};
use tower_tcp::BoxError;
use tower_tcp::admit::{AccessList, AccessRules, AddressFilter, PerClient};
use tower_tcp::networks::Networks;
use tower_tcp::preconnect::{Chain, PreConnectExt, PreConnectLayer};
use tower_tcp::proxy::{ProxyProtocol, Untrusted};

/// Limits on clients: which may connect, and how many connections each may have.
#[derive(clap::Args)]
pub(crate) struct Door {
    /// Networks of the proxies that send a PROXY header, such as `10.0.0.0/8,unix`. If set, all
    /// other peers are refused.
    #[arg(long)]
    proxy_from: Option<Networks>,

    /// Maximum number of open connections per client. A client is an IPv4 address, or the first 64
    /// bits of an IPv6 address.
    #[arg(long)]
    per_client: Option<usize>,

    /// File with the networks that may not connect, such as `203.0.113.0/24`, one per line. SIGHUP
    /// reloads it.
    #[arg(long)]
    deny: Option<PathBuf>,
}

/// The pre-connect hooks. The PROXY header is read first, because the other hooks use the address
/// of the client.
pub(crate) type Hooks = Chain<Chain<ProxyProtocol, AddressFilter>, PerClient>;

impl Door {
    /// Returns the filter for peer addresses, and the hooks for client addresses if any flag is
    /// set.
    pub(crate) fn open(self) -> Result<(AddressFilter, Option<PreConnectLayer<Hooks>>), BoxError> {
        let list = AccessList::default();
        let asks = self.proxy_from.is_some() || self.deny.is_some() || self.per_client.is_some();
        if let Some(path) = self.deny {
            list.replace(load(&path)?);
            let (list, mut hangups) = (list.clone(), signal(SignalKind::hangup())?);
            tokio::spawn(async move {
                while hangups.recv().await.is_some() {
                    let file = path.clone();
                    // Loading a long list takes a while. Connections are served meanwhile.
                    let loading = tokio::task::spawn_blocking(move || load(&file));
                    let loaded = loading.await.map_err(BoxError::from).and_then(|it| it);
                    match loaded.map(|rules| list.replace(rules)) {
                        Ok(()) => eprintln!("{}: loaded again", path.display()),
                        // The previous list stays in effect.
                        Err(err) => eprintln!("{}: {err}", path.display()),
                    }
                }
            });
        }
        let proxy = match self.proxy_from {
            Some(networks) => ProxyProtocol::trusting(networks),
            None => ProxyProtocol::trusting(Networks::new()).untrusted(Untrusted::Direct),
        };
        let filter = AddressFilter::from(list);
        let per_client = PerClient::new(self.per_client.unwrap_or(usize::MAX));
        let hooks = proxy.chain(filter.clone()).chain(per_client);
        Ok((filter, asks.then(|| PreConnectLayer::new(hooks))))
    }
}

fn load(path: &Path) -> Result<AccessRules, BoxError> {
    let networks = std::fs::read_to_string(path)?.parse()?;
    Ok(AccessRules::new().deny(networks))
}

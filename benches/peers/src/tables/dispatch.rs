//! Compares the ways in which a pipeline runs its requests.

use anyhow::Result;

use super::ahead;
use crate::bench::Bench;
use crate::load::{CONNECTIONS, Load};
use crate::server::Server;
use crate::table;

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let way = |way: &str| Ok::<_, anyhow::Error>(Server::own("dispatch")?.arg(way).named(way));
    let servers = [
        Server::own("bytes")?,
        way("one-at-a-time")?,
        way("in-flight")?,
        way("multiplexed")?,
    ];
    table::head(
        bench,
        "Ways of dispatch",
        &format!(
            "Lines of 16 bytes over {CONNECTIONS} connections, as above, without layers. \
             `in-flight` and `multiplexed` run 64 requests of a connection at a time."
        ),
    )?;
    ahead(bench, &servers, &[1, 16, 128], |ahead| {
        Load::lines(16, ahead)
    })
    .await
}

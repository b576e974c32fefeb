//! Echoed lines: how many there are in a second, and what a request costs.

use anyhow::Result;

use super::{ahead, echoes};
use crate::bench::Bench;
use crate::load::{CONNECTIONS, Load};
use crate::table;

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let (servers, missing) = echoes()?;
    for bytes in [16, 1024] {
        table::head(
            bench,
            &format!("Lines of {bytes} bytes"),
            &format!(
                "Echoed over {CONNECTIONS} connections. p50 and p99 are of all that is ahead, from the first byte sent to the last received.{missing}"
            ),
        )?;
        ahead(bench, &servers, &[1, 16, 128], |ahead| {
            Load::lines(bytes, ahead)
        })
        .await?;
    }
    Ok(())
}

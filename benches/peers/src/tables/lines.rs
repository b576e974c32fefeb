//! Echoed lines: how many a second, and the cost of each.

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
                "Echoed over {CONNECTIONS} connections. p50 and p99 are times of a whole batch, \
                 from its first byte sent to its last byte received.{missing}"
            ),
        )?;
        ahead(bench, &servers, &[1, 16, 128], |ahead| {
            Load::lines(bytes, ahead)
        })
        .await?;
    }
    Ok(())
}

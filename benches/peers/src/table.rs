//! Prints figures as Markdown, with the date, the machine and the method.

use std::path::Path;

use anyhow::Result;
use nix::sys::utsname::uname;
use tabled::builder::Builder;
use tabled::settings::object::Columns;
use tabled::settings::{Alignment, Style};
use time::OffsetDateTime;

use crate::bench::{Bench, Samples};
use crate::server::{OPTIMISED, Server, field};

/// A column.
#[derive(Clone, Copy)]
pub(crate) struct Figure {
    name: &'static str,
    digits: usize,
    compared: bool,
}

impl Figure {
    pub(crate) const fn new(name: &'static str) -> Self {
        Self {
            name,
            digits: 0,
            compared: false,
        }
    }

    /// Prints this many decimal places.
    pub(crate) const fn digits(mut self, digits: usize) -> Self {
        self.digits = digits;
        self
    }

    /// Also prints the ratio to the first server's figure.
    pub(crate) const fn compared(mut self) -> Self {
        self.compared = true;
        self
    }
}

/// Prints the head of a table: its name, the date, the machine and the method.
pub(crate) fn head(bench: &Bench, name: &str, how: &str) -> Result<()> {
    let kernel = uname()?;
    println!("## {name}\n");
    println!(
        "{}; {}, {} {}, {} processors; median of {} rounds of {} s, ratios within a round.\n",
        OffsetDateTime::now_utc().date(),
        field(Path::new("/proc/cpuinfo"), "model name")
            .unwrap_or_default()
            .trim_start_matches(": "),
        kernel.sysname().display(),
        kernel.release().display(),
        bench.processors(),
        bench.effort.rounds,
        bench.effort.secs,
    );
    if !OPTIMISED {
        println!("**Built without optimisation: figures of nothing.**\n");
    }
    println!("{how}\n");
    Ok(())
}

/// Rows of figures. Rows that belong together share a key, and are compared with the first row of
/// that key.
pub(crate) struct Table<const N: usize> {
    figures: [Figure; N],
    rows: Builder,
}

impl<const N: usize> Table<N> {
    /// Creates an empty table whose rows are servers. `key` names the keys' column.
    pub(crate) fn new(key: &str, figures: [Figure; N]) -> Self {
        Self::of(key, "server", figures)
    }

    /// Creates an empty table whose rows are something other than servers.
    pub(crate) fn of(key: &str, row: &str, figures: [Figure; N]) -> Self {
        let names = figures.iter().map(|figure| figure.name.to_owned());
        let ratios = figures
            .iter()
            .filter(|figure| figure.compared)
            .map(|figure| format!("{} ×", figure.name));
        let mut rows = Builder::default();
        rows.push_record(cells(key, row, names, ratios));
        Self { figures, rows }
    }

    /// Adds a row for each server.
    pub(crate) fn rows(&mut self, key: &str, servers: &[Server], samples: &[Samples<N>]) {
        for (server, row) in servers.iter().zip(samples) {
            self.row(key, server.name(), row, &samples[0]);
        }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, key: &str, name: &str, samples: &Samples<N>, first: &Samples<N>) {
        let figures = self.figures.iter().enumerate();
        let medians = figures
            .clone()
            .map(|(n, figure)| format!("{:.*}", figure.digits, samples.median(n)));
        let ratios = figures
            .filter(|(_, figure)| figure.compared)
            .map(|(n, _)| format!("{:.2}", samples.ratio(n, first)));
        self.rows.push_record(cells(key, name, medians, ratios));
    }

    pub(crate) fn print(self) {
        let mut table = self.rows.build();
        table.with(Style::markdown());
        table.modify(Columns::new(2..), Alignment::right());
        println!("{table}\n");
    }
}

fn cells(
    key: &str,
    name: &str,
    figures: impl Iterator<Item = String>,
    ratios: impl Iterator<Item = String>,
) -> impl Iterator<Item = String> {
    [key, name]
        .map(str::to_owned)
        .into_iter()
        .chain(figures)
        .chain(ratios)
}

//! Rounds: each server takes its turn in every round.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::server::{Running, Server};

/// The length and number of the measurements.
#[derive(Args, Clone, Copy)]
pub(crate) struct Effort {
    /// The number of turns of each server.
    #[arg(
        long,
        global = true,
        default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub rounds: u32,

    /// The measured part of a turn, in seconds.
    #[arg(long, global = true, default_value_t = 2.0)]
    pub secs: f64,
}

/// Runs a comparison.
pub(crate) struct Bench {
    pub effort: Effort,
    /// The processors this program was started on.
    all: CpuSet,
    server: CpuSet,
    load: CpuSet,
}

impl Bench {
    pub(crate) fn new(effort: Effort) -> Result<Self> {
        let all = sched_getaffinity(own_thread())
            .context("the processors of this process are unknown")?;
        let mut numbers = members(&all);
        let server = numbers.next().context("there is no processor")?;
        let load = numbers.next().unwrap_or(server);
        let (server, load) = (only(server)?, only(load)?);
        Ok(Self {
            effort,
            all,
            server,
            load,
        })
    }

    /// Returns how long a turn is measured.
    pub(crate) fn period(&self) -> Duration {
        Duration::from_secs_f64(self.effort.secs)
    }

    /// Returns how many processors there are.
    pub(crate) fn processors(&self) -> usize {
        members(&self.all).count()
    }

    /// Starts and measures each server once a round. Returns the samples of each server, in the
    /// order of the rounds.
    pub(crate) async fn rounds<const N: usize>(
        &self,
        servers: &[Server],
        measure: impl AsyncFn(&Running) -> Result<[f64; N]>,
    ) -> Result<Vec<Samples<N>>> {
        let mut samples = vec![Samples(Vec::new()); servers.len()];
        for _ in 0..self.effort.rounds {
            for (server, samples) in servers.iter().zip(&mut samples) {
                let running = self.start(server).await?;
                let sample = measure(&running)
                    .await
                    .with_context(|| format!("while {} was measured", server.name()))?;
                running.kill().await?;
                samples.0.push(sample);
            }
        }
        sched_setaffinity(own_thread(), &self.all)?;
        Ok(samples)
    }

    /// Starts a server on its own processor. This thread stays on the processor of the load.
    async fn start(&self, server: &Server) -> Result<Running> {
        // A process inherits the processors of the thread that starts it.
        sched_setaffinity(own_thread(), &self.server)?;
        let spawned = server.spawn();
        sched_setaffinity(own_thread(), &self.load)?;
        spawned?
            .listening()
            .await
            .with_context(|| format!("{} does not listen", server.name()))
    }
}

/// The samples of one server: a row of figures for each round.
#[derive(Clone, Debug)]
pub(crate) struct Samples<const N: usize>(Vec<[f64; N]>);

impl<const N: usize> Samples<N> {
    /// Creates the samples of figures that were not measured in rounds.
    pub(crate) fn once(figures: [f64; N]) -> Self {
        Self(vec![figures])
    }

    /// Returns some of the figures, in the order given.
    pub(crate) fn select<const M: usize>(&self, figures: [usize; M]) -> Samples<M> {
        Samples(
            self.0
                .iter()
                .map(|sample| figures.map(|n| sample[n]))
                .collect(),
        )
    }

    /// Returns the median of a figure.
    pub(crate) fn median(&self, figure: usize) -> f64 {
        median(self.0.iter().map(|sample| sample[figure]).collect())
    }

    /// Returns the median ratio of a figure to the same figure of another server in the same round.
    pub(crate) fn ratio(&self, figure: usize, to: &Self) -> f64 {
        let pairs = self.0.iter().zip(&to.0);
        median(pairs.map(|(a, b)| a[figure] / b[figure]).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(values[middle - 1], values[middle])
    } else {
        values[middle]
    }
}

fn members(set: &CpuSet) -> impl Iterator<Item = usize> {
    (0..CpuSet::count()).filter(|&n| set.is_set(n).unwrap_or(false))
}

fn only(processor: usize) -> nix::Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(processor)?;
    Ok(set)
}

fn own_thread() -> Pid {
    Pid::from_raw(0)
}

//! Everything that a program can do with `POE::Component::Server::TCP` it can do with this crate,
//! and the faults of that component are absent.
//!
//! `tN_..` is one of POE's own tests, ported. `sN_xM_..` is one of fifteen scenarios, with the
//! number of the experiment that showed the behavior of POE 1.370. MIGRATION.md lists both, and the
//! tests of other files that cover the rest; `table` checks that list. `tests/README.md` explains
//! each code.

#[path = "../support/mod.rs"]
mod support;

mod course;
mod endings;
mod own_tests;
mod pause;
mod table;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tower_tcp::BoxError;

/// The record of events, in order.
#[derive(Clone, Debug, Default)]
struct Journal(Arc<Mutex<Vec<String>>>);

impl Journal {
    fn note(&self, what: impl Into<String>) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.push(what.into());
    }

    fn all(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn count(&self, what: &str) -> usize {
        self.all().iter().filter(|noted| *noted == what).count()
    }
}

/// Waits for what takes no time but needs the kernel.
async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("it takes no time")
}

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

fn text(line: &Bytes) -> String {
    String::from_utf8_lossy(line).into_owned()
}

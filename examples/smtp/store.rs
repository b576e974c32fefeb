//! Where mails are kept: in memory, or in a maildir. Knows nothing of connections.

use std::io;

use bytes::Bytes;

use super::maildir::{self, Maildir};
use super::memory::{self, Memory};

pub(crate) enum Store {
    Memory(Memory),
    Maildir(Maildir),
}

/// A mail that is being received. If it is dropped, there was none.
pub(crate) enum Draft {
    Memory(memory::Draft),
    Maildir(maildir::Draft),
}

impl Store {
    pub(crate) async fn begin(&self) -> io::Result<Draft> {
        Ok(match self {
            Self::Memory(memory) => Draft::Memory(memory.begin()),
            Self::Maildir(maildir) => Draft::Maildir(maildir.begin().await?),
        })
    }
}

impl Draft {
    /// Adds some text.
    ///
    /// # Errors
    ///
    /// [`StorageFull`](io::ErrorKind::StorageFull) when there is no room for it now.
    pub(crate) async fn write(&mut self, text: Bytes) -> io::Result<()> {
        match self {
            Self::Memory(draft) => draft.write(&text),
            Self::Maildir(draft) => draft.write(&text).await,
        }
    }

    /// Makes it a mail. Done when it will not be lost any more.
    pub(crate) async fn keep(self) -> io::Result<()> {
        match self {
            Self::Memory(draft) => draft.keep(),
            Self::Maildir(draft) => return draft.keep().await,
        }
        Ok(())
    }
}

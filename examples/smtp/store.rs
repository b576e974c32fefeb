//! The store of mails: memory, or a maildir. It does not depend on connections.

use std::io;

use bytes::Bytes;

use super::maildir::{self, Maildir};
use super::memory::{self, Memory};

pub(crate) enum Store {
    Memory(Memory),
    Maildir(Maildir),
}

/// A mail that is being received. Dropping it discards the mail.
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
    /// Appends text.
    ///
    /// # Errors
    ///
    /// Returns [`StorageFull`](io::ErrorKind::StorageFull) if there is no room for the text now.
    pub(crate) async fn write(&mut self, text: Bytes) -> io::Result<()> {
        match self {
            Self::Memory(draft) => draft.write(&text),
            Self::Maildir(draft) => draft.write(&text).await,
        }
    }

    /// Stores the mail. In a maildir, the mail is on disk when this method returns.
    pub(crate) async fn keep(self) -> io::Result<()> {
        match self {
            Self::Memory(draft) => draft.keep(),
            Self::Maildir(draft) => return draft.keep().await,
        }
        Ok(())
    }
}

//! A maildir: each mail is a file that is written in `tmp` and moved to `new` when it is complete.
//! So a reader of `new` needs no lock, and sees only complete mails.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempPath;
use time::OffsetDateTime;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::task::spawn_blocking;

pub(crate) struct Maildir {
    dir: PathBuf,
    /// Part of the file names. `/` and `:` are escaped, because they have a special meaning there.
    hostname: String,
    delivered: AtomicU64,
}

impl Maildir {
    /// Opens a maildir, and creates it if there is none.
    pub(crate) fn open(dir: &Path, hostname: &str) -> io::Result<Self> {
        for sub in ["tmp", "new", "cur"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        Ok(Self {
            dir: dir.to_owned(),
            hostname: hostname.replace('/', "\\057").replace(':', "\\072"),
            delivered: AtomicU64::new(0),
        })
    }

    pub(crate) async fn begin(&self) -> io::Result<Draft> {
        let name = self.unique_name();
        let path = self.dir.join("tmp").join(&name);
        let mut options = File::options();
        let file = options.write(true).create_new(true).open(&path).await?;
        Ok(Draft {
            file,
            tmp: TempPath::try_from_path(path)?,
            new: self.dir.join("new").into(),
            name,
        })
    }

    /// Returns a new file name, made from the time, the process ID, a counter and the host name. It
    /// is unique among all programs that deliver to this maildir.
    fn unique_name(&self) -> String {
        let now = OffsetDateTime::now_utc();
        format!(
            "{}.M{}P{}Q{}.{}",
            now.unix_timestamp(),
            now.microsecond(),
            std::process::id(),
            self.delivered.fetch_add(1, Ordering::Relaxed),
            self.hostname
        )
    }
}

pub(crate) struct Draft {
    file: File,
    /// The file in `tmp`, removed when this value is dropped.
    tmp: TempPath,
    new: Arc<Path>,
    name: String,
}

impl Draft {
    pub(crate) async fn write(&mut self, text: &[u8]) -> io::Result<()> {
        self.file.write_all(text).await
    }

    /// Syncs the file to disk, moves it to `new`, and syncs that directory. The client deletes its
    /// mail when it gets the 250, so the mail must not be lost after that (RFC 5321, section 6.1).
    pub(crate) async fn keep(mut self) -> io::Result<()> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        let Self { tmp, new, name, .. } = self;
        let (from, to) = (tmp, new.join(name));
        spawn_blocking(move || from.persist_noclobber(to)).await??;
        File::open(&new).await?.sync_all().await
    }
}

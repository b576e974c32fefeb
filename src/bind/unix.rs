//! The path of a Unix socket. A server replaces the file of a socket on which no process listens,
//! but not the file of a live socket, except in the race that [`Sockets::bind`] describes. When a
//! server closes its socket, it removes only the file that was created for this socket.
//!
//! [`Sockets::bind`]: super::Sockets::bind

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, SockAddr, Socket, Type};

use super::options::SocketOptions;

/// A bound path. Dropping this value removes the path, if `owned` is set and the file there is
/// still the one that was created for the socket.
///
/// This value must be dropped before its socket, because the system may give the file's inode
/// number to another file once the socket is closed.
#[derive(Debug)]
pub(super) struct OwnPath {
    pub(super) path: PathBuf,
    /// The device and the inode number of the file.
    pub(super) file: (u64, u64),
    /// Set if this process must remove the path. Not set while another process with the same socket
    /// must remove it.
    owned: AtomicBool,
}

impl OwnPath {
    /// Creates the value for a path that another process has bound. At first, that process is
    /// responsible for removing the path. [`own`](Self::own) can make this process responsible.
    #[cfg(feature = "handover")]
    pub(super) fn of_other(path: PathBuf, file: (u64, u64)) -> Self {
        let owned = AtomicBool::new(false);
        Self { path, file, owned }
    }

    /// Sets whether this process removes the path.
    #[cfg(feature = "handover")]
    pub(super) fn own(&self, owned: bool) {
        self.owned.store(owned, Ordering::Relaxed);
    }
}

impl Drop for OwnPath {
    fn drop(&mut self) {
        if !self.owned.load(Ordering::Relaxed) {
            return;
        }
        let still_ours = fs::symlink_metadata(&self.path).is_ok_and(|now| id(&now) == self.file);
        if still_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(
                target: "tower_tcp",
                path = %self.path.display(),
                %error,
                "a socket file was not removed",
            );
        }
    }
}

fn id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Listens at a path.
pub(super) fn listen(path: &Path, options: &SocketOptions) -> io::Result<(Socket, OwnPath)> {
    let address = SockAddr::unix(path)?;
    // This call also rejects a path with a NUL byte, at which the bind would silently cut the path.
    remove_stale(path, &address)?;

    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The process may change its working directory before the path is removed.
    let absolute = std::path::absolute(path)?;
    socket.bind(&address)?;
    let own = OwnPath {
        file: id(&fs::symlink_metadata(path)?),
        path: absolute,
        owned: AtomicBool::new(true),
    };
    // The system refuses connections between bind and listen, so no client connects before the mode
    // is set.
    if let Some(mode) = options.mode() {
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    socket.listen(options.queue())?;
    Ok((socket, own))
}

/// Listens on an abstract name, which has no file and disappears with its socket.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn listen_abstract(name: &str, options: &SocketOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(format!("\0{name}"))?)?;
    socket.listen(options.queue())?;
    Ok(socket)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn listen_abstract(_name: &str, _options: &SocketOptions) -> io::Result<Socket> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Removes the file of a socket on which no process listens any more.
///
/// Anything else at the path (a live socket, a plain file, a link) is kept, and makes the bind
/// fail.
fn remove_stale(path: &Path, address: &SockAddr) -> io::Result<()> {
    let Some(found) = socket_at(path)? else {
        return Ok(());
    };
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A blocking probe would wait for a live server with a full backlog.
    probe.set_nonblocking(true)?;
    let stale = match probe.connect(address) {
        Err(err) if err.kind() == io::ErrorKind::ConnectionRefused => true,
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => return Err(err),
        _ => false,
    };
    // Another server may have replaced the file meanwhile. Only this second check notices that.
    if stale && socket_at(path)? == Some(found) {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Returns the device and the inode number of the file at the path, if it is a socket and not a
/// link to one.
fn socket_at(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(Some(id(&metadata))),
        Ok(_) => Ok(None),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}

//! The number of connections in the backlog.
//!
//! The number is read from `/proc`. The listener's `TCP_INFO` contains this number, too, but
//! reading it needs a descriptor of the listener. That descriptor would keep the listener open.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};

use crate::connection::Address;

/// Returns the total number of connections that wait to be accepted at the TCP addresses among
/// `addresses`. If another process listens on the same addresses, its waiting connections are
/// included. Returns `None` if there is no TCP address, or if the system does not provide the
/// number.
pub(crate) fn accept_queue(addresses: &[Address]) -> Option<usize> {
    let ours: Vec<_> = addresses.iter().filter_map(Address::tcp).collect();
    if ours.is_empty() {
        return None;
    }
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let tables = tables
        .into_iter()
        .filter_map(|table| File::open(table).ok());
    let waiting = tables.map(|table| waiting_at(&ours, BufReader::new(table)));
    waiting.reduce(|sum, one| sum + one)
}

/// Returns the total number of connections in `table` that wait at `addresses`. Ignores the scopes
/// of link-local addresses, because a table does not contain them.
fn waiting_at(addresses: &[SocketAddr], table: impl BufRead) -> usize {
    let is_ours = |ip, port| {
        addresses
            .iter()
            .any(|ours| (ours.ip(), ours.port()) == (ip, port))
    };
    listeners(table)
        .filter(|(address, _)| is_ours(address.ip(), address.port()))
        .map(|(_, waiting)| waiting)
        .sum()
}

/// Reads the addresses of the listening sockets, and the number of connections that wait at each.
/// The table lists listening sockets first, so only its beginning is read.
fn listeners(table: impl BufRead) -> impl Iterator<Item = (SocketAddr, usize)> {
    table
        .lines()
        .skip(1)
        .map_while(Result::ok)
        .map_while(|row| listener(&row))
}

/// Returns the local address and the length of the accept queue from a row of [proc_net_tcp].
/// Returns `None` if the row's socket does not listen. The first fields of a row are its number,
/// the local and the remote address, the state, and the lengths of two queues. For a listening
/// socket the second queue is the accept queue.
///
/// [proc_net_tcp]: https://docs.kernel.org/networking/proc_net_tcp.html
fn listener(row: &str) -> Option<(SocketAddr, usize)> {
    const LISTEN: &str = "0A";
    let mut fields = row.split_ascii_whitespace().skip(1);
    let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    let (_unsent, waiting) = fields.next()?.split_once(':')?;
    let (ip, port) = local.split_once(':')?;
    if state != LISTEN {
        return None;
    }
    let port = u16::from_str_radix(port, 16).ok()?;
    let address = SocketAddr::new(ip_address(ip)?.to_canonical(), port);
    Some((address, usize::from_str_radix(waiting, 16).ok()?))
}

/// Parses an address, which is written as hexadecimal 32-bit words in the machine's byte order.
fn ip_address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(hex.get(8 * at..8 * at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    if hex.len() == 8 {
        return Some(IpAddr::from(word(0)?));
    }
    let mut octets = [0; 16];
    for (at, into) in octets.chunks_exact_mut(4).enumerate() {
        into.copy_from_slice(&word(at)?);
    }
    Some(IpAddr::from(octets))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, SocketAddrV6};

    use super::*;

    /// A table with a socket that listens at `ip` and port 8080. Three connections wait there.
    fn table(ip: Ipv6Addr) -> String {
        let words = ip.octets();
        let words = words.chunks_exact(4).map(|word| {
            let word = word.try_into().map(u32::from_ne_bytes);
            format!("{:08X}", word.unwrap_or_default())
        });
        let (local, remote) = (words.collect::<String>(), "0".repeat(32));
        format!("header\n 0: {local}:1F90 {remote}:0000 0A 00000000:00000003 00:00000000\n")
    }

    #[test]
    fn the_queue_of_a_link_local_address_is_found_without_its_scope() {
        let ip = Ipv6Addr::new(0xfe80, 0, 0, 0, 0xfc, 0xff, 0xfe00, 1);
        let at = |port| [SocketAddr::from(SocketAddrV6::new(ip, port, 0, 2))];

        assert_eq!(waiting_at(&at(8080), table(ip).as_bytes()), 3);
        assert_eq!(waiting_at(&at(8081), table(ip).as_bytes()), 0);
    }
}

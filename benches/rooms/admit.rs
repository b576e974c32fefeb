//! `networks`: looking up an address among 100,000 networks, as it is done for each connection.

use std::collections::HashSet;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use divan::Bencher;
use divan::counter::ItemsCount;
use tower_tcp::networks::Networks;

use crate::support::measured;

/// The number of networks. Twice as many addresses are looked up, and half of the addresses are in
/// a network.
const NETWORKS: u32 = 100_000;

#[derive(Clone, Copy, Debug)]
enum Lookup {
    /// The baseline, which can only hold networks of one length.
    ByHash,
    Networks,
    /// Networks of IPv6, which share their first 32 bits.
    Networks6,
}

#[divan::bench(args = [Lookup::ByHash, Lookup::Networks, Lookup::Networks6])]
fn lookup(bencher: Bencher, lookup: Lookup) {
    let addresses = (0..2 * NETWORKS).map(scattered);
    let inside = addresses.clone().step_by(2);
    let mut hash = HashSet::new();
    let mut networks = Networks::new();
    let addresses: Vec<IpAddr> = match lookup {
        Lookup::ByHash => {
            hash = inside.map(|ip| ip.to_bits() >> 8).collect();
            addresses.map(IpAddr::V4).collect()
        }
        Lookup::Networks => {
            let texts =
                inside.map(|ip| format!("{}/24", Ipv4Addr::from_bits(ip.to_bits() & !0xff)));
            networks = Networks::parse(texts).unwrap();
            addresses.map(IpAddr::V4).collect()
        }
        Lookup::Networks6 => {
            let texts = inside.map(|ip| format!("{}/64", v6(ip)));
            networks = Networks::parse(texts).unwrap();
            addresses.map(|ip| IpAddr::V6(v6(ip))).collect()
        }
    };
    let found = |ip: &&IpAddr| match (lookup, ip) {
        (Lookup::ByHash, IpAddr::V4(v4)) => hash.contains(&(v4.to_bits() >> 8)),
        _ => networks.contains_ip(**ip),
    };
    bencher
        .counter(ItemsCount::new(addresses.len()))
        .bench_local(|| {
            measured(|| {
                let found = black_box(&addresses).iter().filter(found).count();
                assert!(found >= addresses.len() / 2);
            });
        });
}

/// Returns the `n`th address of a sequence without order.
fn scattered(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(n.wrapping_mul(2_654_435_761))
}

/// Returns the first address of a `/64` network in `2001:db8::/32`, with the IPv4 address as the
/// other 32 bits.
fn v6(ip: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(ip.to_bits()) << 64)
}

//! `networks`: looking up an address among 100,000 networks, as it is done for each connection.

use std::collections::HashSet;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use divan::Bencher;
use divan::counter::ItemsCount;
use tower_tcp::networks::Networks;

use crate::support::measured;

/// The number of networks, and of addresses that are looked up: half of them are in a network.
const NETWORKS: u32 = 100_000;

#[derive(Clone, Copy, Debug)]
enum Lookup {
    /// The baseline, which can only hold networks of one length.
    ByHash,
    Networks,
}

#[divan::bench(args = [Lookup::ByHash, Lookup::Networks])]
fn lookup(bencher: Bencher, lookup: Lookup) {
    let addresses: Vec<_> = (0..2 * NETWORKS).map(scattered).collect();
    let inside = addresses.iter().step_by(2);
    let (hash, networks) = match lookup {
        Lookup::ByHash => (
            inside.map(|ip| ip.to_bits() >> 8).collect(),
            Networks::new(),
        ),
        Lookup::Networks => {
            let networks = inside.map(|ip| Ipv4Addr::from_bits(ip.to_bits() & !0xff));
            let networks = networks.map(|ip| format!("{ip}/24"));
            (HashSet::new(), Networks::parse(networks).unwrap())
        }
    };
    let found = |ip: &&Ipv4Addr| match lookup {
        Lookup::ByHash => hash.contains(&(ip.to_bits() >> 8)),
        Lookup::Networks => networks.contains_ip(IpAddr::V4(**ip)),
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

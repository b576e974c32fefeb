//! Looks up an address among many networks of one family, IPv4 or IPv6.

use std::net::IpAddr;

use ipnet::IpNet;

/// The networks of one family, cut at their borders into ranges that do not overlap.
///
/// Because a set of networks never changes, the ranges lie in one block, in order. Addresses are
/// divided into buckets, and a lookup searches only among the ranges that begin in the bucket of
/// the address. Some bits of an address are the index of its bucket. They follow the leading bits
/// that the starts of all ranges share. If the starts are spread evenly from the first to the last,
/// only a few ranges begin in each bucket. At worst almost all ranges begin in one bucket, and the
/// search takes as long as the lookup in a trie would.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges {
    /// The first address of each range. A range ends where the next one begins.
    starts: Vec<u128>,
    /// The longest prefix length of the networks that contain the range, or `None` if the range is
    /// in no network.
    lengths: Vec<Option<u8>>,
    /// For each bucket, the number of ranges that begin in earlier buckets. The last entry is the
    /// number of all ranges. The index of an address's bucket is the value of the `bits` bits that
    /// follow the first `skip` bits of the address.
    before: Vec<usize>,
    /// The number of leading bits that all starts share.
    skip: u32,
    /// The number of address bits that select a bucket.
    bits: u32,
}

impl Ranges {
    /// Creates the ranges of `networks`. These must be ordered by address, and each must come after
    /// those that contain it.
    pub(super) fn new<'a>(networks: impl IntoIterator<Item = &'a IpNet>) -> Self {
        let mut ranges = Self::default();
        // The last address and the prefix length of each network that contains the current address.
        // The smallest network is at the end.
        let mut around: Vec<(u128, u8)> = Vec::new();
        for network in networks {
            let first = address_bits(network.network());
            while let Some((last, _)) = around.pop_if(|(last, _)| *last < first) {
                ranges.end(last, &around);
            }
            around.push((address_bits(network.broadcast()), network.prefix_len()));
            ranges.begin(first, Some(network.prefix_len()));
        }
        while let Some((last, _)) = around.pop() {
            ranges.end(last, &around);
        }
        ranges.count_before();
        ranges.starts.shrink_to_fit();
        ranges.lengths.shrink_to_fit();
        ranges
    }

    /// Begins a range. If the previous range has the same start, it would be empty, so the new
    /// range replaces it.
    fn begin(&mut self, start: u128, length: Option<u8>) {
        if self.starts.last() == Some(&start) {
            self.lengths.pop();
        } else {
            self.starts.push(start);
        }
        self.lengths.push(length);
    }

    /// Ends a network. The network around it continues, if there is one.
    fn end(&mut self, last: u128, around: &[(u128, u8)]) {
        if let Some(next) = last.checked_add(1) {
            self.begin(next, around.last().map(|(_, length)| *length));
        }
    }

    /// Sets `skip` and `bits`, and fills `before`. A single range needs no buckets.
    fn count_before(&mut self) {
        let [first, .., last] = self.starts[..] else {
            return;
        };
        self.skip = (first ^ last).leading_zeros();
        self.bits = self.starts.len().ilog2();
        for (index, start) in self.starts.iter().enumerate() {
            let bucket = self.bucket(*start);
            // Adds the entries of the buckets after the previous start's bucket, up to and
            // including this start's bucket.
            self.before.resize(self.before.len().max(bucket + 1), index);
        }
        self.before.resize((1 << self.bits) + 1, self.starts.len());
    }

    /// Returns the index of the bucket of an address that is neither before the first start nor
    /// after the last.
    fn bucket(&self, address: u128) -> usize {
        // The index has `bits` bits, which is fewer than `usize` has.
        ((address << self.skip) >> (u128::BITS - self.bits)) as usize
    }

    /// Returns the longest prefix length of the networks that contain the address, if any does.
    pub(super) fn longest(&self, address: u128) -> Option<u8> {
        let range = self.begun(address).checked_sub(1)?;
        self.lengths[range]
    }

    /// Returns the number of ranges that begin at or before the address.
    fn begun(&self, address: u128) -> usize {
        if self.starts.last().is_none_or(|last| *last <= address) {
            return self.starts.len();
        }
        if self.starts.first().is_none_or(|first| address < *first) {
            return 0;
        }
        let bucket = self.bucket(address);
        let (from, to) = (self.before[bucket], self.before[bucket + 1]);
        from + self.starts[from..to].partition_point(|start| *start <= address)
    }
}

fn address_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_search(networks: &[IpNet], address: IpAddr) -> Option<u8> {
        let around = networks.iter().filter(|network| network.contains(&address));
        around.map(IpNet::prefix_len).max()
    }

    /// Compares each lookup with a search through all networks.
    fn check(networks: &[IpNet], addresses: &[IpAddr]) {
        let ranges = Ranges::new(networks);
        for address in addresses {
            assert_eq!(
                ranges.longest(address_bits(*address)),
                by_search(networks, *address),
                "{address} in {networks:?}"
            );
        }
    }

    /// Returns a network and all networks in it, in order.
    fn all_within(network: IpNet) -> Vec<IpNet> {
        let lengths = network.prefix_len()..=network.max_prefix_len();
        let subnets = lengths.flat_map(|length| network.subnets(length));
        let mut all: Vec<_> = subnets.flatten().collect();
        all.sort();
        all
    }

    #[test]
    fn each_set_of_networks_within_eight_addresses_answers_as_a_search_does() {
        for (whole, around) in [
            ("0.0.0.0/29", ["0.0.0.8", "255.255.255.255"]),
            ("255.255.255.248/29", ["255.255.255.247", "0.0.0.0"]),
            ("2001:db8::8/125", ["2001:db8::7", "2001:db8::10"]),
            (
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff8/125",
                ["ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff7", "::"],
            ),
        ] {
            let all = all_within(whole.parse().expect("a network"));
            let around = around.map(|text| text.parse().expect("an address"));
            let inside = all.iter().map(IpNet::addr);
            let addresses: Vec<_> = inside.chain(around).collect();
            for set in 0_u32..1 << all.len() {
                let networks = all.iter().enumerate();
                let networks = networks.filter(|(bit, _)| set & 1 << bit != 0);
                let networks: Vec<_> = networks.map(|(_, network)| *network).collect();
                check(&networks, &addresses);
            }
        }
    }

    #[test]
    fn a_thousand_networks_of_all_lengths_answer_as_a_search_does() {
        let bits = |n: u128| n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        for shared in [0_u32, 32, 100] {
            let address = |n| IpAddr::V6((bits(n) >> shared).into());
            let networks = (0..1000_u32).map(|n| {
                let length = shared + bits(n.into()) as u32 % (u128::BITS - shared) + 1;
                let network = IpNet::new(address(n.into()), length as u8).expect("a length");
                network.trunc()
            });
            let mut networks: Vec<_> = networks
                .chain(["fe80::/10".parse().expect("far")])
                .collect();
            networks.sort();
            networks.dedup();
            let addresses: Vec<_> = (0..2000).map(address).collect();
            check(&networks, &addresses);
            networks.pop();
            check(&networks, &addresses);
        }
    }

    #[test]
    fn networks_far_apart_answer_as_a_search_does() {
        let networks: [IpNet; 8] = [
            "::/0",
            "2000::/3",
            "2001:db8::/32",
            "2001:db8::/128",
            "2001:db8:0:1::/64",
            "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff/128",
            "4000::/2",
            "8000::/1",
        ]
        .map(|text| text.parse().expect("a network"));
        let borders = networks.iter().flat_map(|network| {
            let (first, last) = (
                address_bits(network.network()),
                address_bits(network.broadcast()),
            );
            [first.wrapping_sub(1), first, last, last.wrapping_add(1)]
        });
        let addresses: Vec<_> = borders.map(|bits| IpAddr::V6(bits.into())).collect();
        for from in 0..networks.len() {
            check(&networks[from..], &addresses);
        }
    }
}

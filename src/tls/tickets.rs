//! Session tickets with keys from files, so that several processes can share the keys.
//!
//! rustls encrypts its own tickets with random keys, which no other process has. The tickets of
//! this module have the same form: the name of the key, a random nonce, and the session, which
//! ChaCha20-Poly1305 encrypts and authenticates. The encrypted part also contains the time of
//! issue.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use tokio_rustls::rustls::pki_types::UnixTime;
use tokio_rustls::rustls::server::ProducesTickets;

use super::clients::Policy;
use super::error::TlsError;

/// The time in seconds for which a ticket is accepted: 12 hours, as for rustls's own tickets.
pub(super) const LIFETIME: u32 = 12 * 60 * 60;
const NAME_LEN: usize = 16;
const TIME_LEN: usize = size_of::<u64>();

/// The ticket keys of a configuration. The first key encrypts tickets, and all keys decrypt them.
pub(super) struct Tickets {
    keys: Box<[Key]>,
    random: SystemRandom,
}

struct Key {
    name: [u8; NAME_LEN],
    key: LessSafeKey,
}

impl Tickets {
    /// Reads one key from each file.
    pub(super) fn read(files: &[PathBuf], policy: Policy) -> Result<Self, TlsError> {
        let keys = files.iter().map(|file| {
            let secret = read(file)?;
            Key::new(&secret, policy).ok_or_else(|| TlsError::BadTicketKey {
                file: file.display().to_string(),
                bytes: secret.len(),
            })
        });
        Ok(Self {
            keys: keys.collect::<Result<_, _>>()?,
            random: SystemRandom::new(),
        })
    }

    fn seal(&self, session: &[u8], now: u64) -> Option<Vec<u8>> {
        let key = self.keys.first()?;
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut ticket = [key.name.as_slice(), &nonce, &now.to_be_bytes(), session].concat();
        let tag = key.key.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(key.name),
            &mut ticket[NAME_LEN + NONCE_LEN..],
        );
        ticket.extend_from_slice(tag.ok()?.as_ref());
        Some(ticket)
    }

    fn open(&self, ticket: &[u8], now: u64) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_first_chunk::<NAME_LEN>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let open = |key: &Key| {
            let nonce = Nonce::assume_unique_for_key(*nonce);
            let mut sealed = sealed.to_vec();
            let opened = key.key.open_in_place(nonce, Aad::from(*name), &mut sealed);
            let (issued, session) = opened.ok()?.split_first_chunk::<TIME_LEN>()?;
            // If the clock of the process that issued the ticket is ahead, the ticket counts as
            // new.
            let age = now.saturating_sub(u64::from_be_bytes(*issued));
            (age <= u64::from(LIFETIME)).then(|| session.to_vec())
        };
        // The name of a key is not secret, because each ticket begins with it. So the comparison
        // need not take constant time.
        let mut keys = self.keys.iter().filter(|key| key.name == *name);
        keys.find_map(open)
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        self.seal(session, UnixTime::now().as_secs())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.open(ticket, UnixTime::now().as_secs())
    }
}

impl fmt::Debug for Tickets {
    /// Formats the value without its keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").finish_non_exhaustive()
    }
}

impl Key {
    /// Derives a key from the content of a file and the rules for client certificates. Returns
    /// `None` if the content has the wrong size.
    ///
    /// The file may be shared with nginx, which uses the same bytes as a key for another cipher. So
    /// the bytes are not used as a key here, but only as the input of a key derivation.
    fn new(secret: &[u8], Policy(policy): Policy) -> Option<Self> {
        let (name, secret) = match secret.len() {
            48 | 80 => secret.split_first_chunk::<NAME_LEN>()?,
            _ => return None,
        };
        let secret = Salt::new(HKDF_SHA256, &policy).extract(secret);
        let key = secret
            .expand(&[b"tower-tcp session ticket"], &CHACHA20_POLY1305)
            .ok()?;
        Some(Self {
            name: *name,
            key: LessSafeKey::new(UnboundKey::from(key)),
        })
    }
}

/// Reads at most 81 bytes of a file. This is one more than the larger of the two possible sizes of
/// a key.
fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    let mut secret = Vec::with_capacity(81);
    let read = File::open(file).and_then(|opened| opened.take(81).read_to_end(&mut secret));
    match read {
        Ok(_) => Ok(secret),
        Err(source) => Err(TlsError::Unreadable {
            pem: file.display().to_string(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tickets(secrets: &[[u8; 80]], policy: Policy) -> Tickets {
        let keys = secrets
            .iter()
            .map(|secret| Key::new(secret, policy).unwrap());
        Tickets {
            keys: keys.collect(),
            random: SystemRandom::new(),
        }
    }

    fn sealed(by: &[[u8; 80]]) -> Vec<u8> {
        tickets(by, Policy::default()).seal(b"session", 0).unwrap()
    }

    fn opens(with: &[[u8; 80]], ticket: &[u8]) -> bool {
        let opened = tickets(with, Policy::default()).open(ticket, 0);
        opened.is_some_and(|session| session == b"session")
    }

    #[test]
    fn the_first_key_encrypts_and_all_of_them_decrypt() {
        let (old, new, next) = ([1; 80], [2; 80], [3; 80]);

        let ticket = sealed(&[new, old]);

        assert!(opens(&[new, old], &ticket));
        assert!(opens(&[next, new], &ticket));
        assert!(opens(&[old, new], &ticket));
        assert!(!opens(&[old], &ticket));
        assert!(!opens(&[], &ticket));
    }

    #[test]
    fn two_keys_of_one_name_both_decrypt() {
        let (one, mut other) = ([1; 80], [1; 80]);
        other[79] = 2;

        assert!(opens(&[one, other], &sealed(&[other])));
        assert!(!opens(&[one], &sealed(&[other])));
    }

    #[test]
    fn a_ticket_is_accepted_for_twelve_hours() {
        let tickets = tickets(&[[1; 80]], Policy::default());
        let ticket = tickets.seal(b"session", 100_000).unwrap();
        let life = u64::from(LIFETIME);

        assert!(tickets.open(&ticket, 100_000 + life).is_some());
        assert!(tickets.open(&ticket, 100_001 + life).is_none());
        // The clock of another process may be ahead.
        assert!(tickets.open(&ticket, 0).is_some());
    }

    #[test]
    fn a_ticket_of_another_policy_is_not_accepted() {
        let ticket = sealed(&[[1; 80]]);

        assert!(opens(&[[1; 80]], &ticket));
        let strict = tickets(&[[1; 80]], Policy([1; 32]));
        assert!(strict.open(&ticket, 0).is_none());
    }

    #[test]
    fn a_ticket_that_was_changed_or_cut_anywhere_is_not_accepted() {
        let ticket = sealed(&[[1; 80]]);

        for at in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[at] ^= 1;
            assert!(!opens(&[[1; 80]], &changed), "changed at {at}");
            assert!(!opens(&[[1; 80]], &ticket[..at]), "cut at {at}");
        }
        assert!(!opens(&[[1; 80]], &[ticket.as_slice(), &[0]].concat()));
    }

    #[test]
    fn a_key_has_48_or_80_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ticket.key");
        for bytes in [0, 16, 32, 47, 48, 49, 64, 79, 80, 81, 1 << 20] {
            std::fs::write(&file, vec![7; bytes]).unwrap();

            let read = Tickets::read(std::slice::from_ref(&file), Policy::default());

            let at_most = bytes.min(81);
            let wanted = format!(
                "a ticket key has 48 or 80 bytes, but {} has {at_most}",
                file.display()
            );
            match bytes {
                48 | 80 => assert_eq!(read.unwrap().keys.len(), 1),
                _ => assert_eq!(read.unwrap_err().to_string(), wanted),
            }
        }
        std::fs::remove_file(&file).unwrap();
        let gone = Tickets::read(std::slice::from_ref(&file), Policy::default()).unwrap_err();
        assert_eq!(gone.to_string(), format!("cannot read {}", file.display()));
    }
}

use std::any::Any;
use std::fmt;
use std::sync::OnceLock;

/// The facts that hooks have added, found by their types. Reading takes no lock.
#[derive(Default)]
pub(crate) struct Facts(OnceLock<Box<Fact>>);

struct Fact {
    fact: Box<dyn Any + Send + Sync>,
    next: Facts,
}

impl Facts {
    /// Appends a fact to the list.
    pub(super) fn insert<F: Any + Send + Sync>(&self, fact: F) {
        let mut end = self;
        let mut fact = Box::new(Fact {
            fact: Box::new(fact),
            next: Self::default(),
        });
        while let Err(taken) = end.0.set(fact) {
            fact = taken;
            match end.0.get() {
                Some(other) => end = &other.next,
                None => return,
            }
        }
    }

    /// Returns the latest fact of type `F`.
    pub(crate) fn get<F: Any>(&self) -> Option<&F> {
        let facts = std::iter::successors(self.0.get(), |fact| fact.next.0.get());
        facts.filter_map(|fact| fact.fact.downcast_ref()).last()
    }
}

impl Drop for Facts {
    fn drop(&mut self) {
        // Without this loop, each fact would drop the next one, and a long list would exhaust the
        // stack.
        let mut next = self.0.take();
        while let Some(mut fact) = next {
            next = fact.next.0.take();
        }
    }
}

impl fmt::Debug for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Facts").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_fact_of_a_type_counts_and_hides_no_other_type() {
        let facts = Facts::default();
        assert_eq!(facts.get::<u8>(), None);

        facts.insert(1_u8);
        facts.insert("text");
        facts.insert(2_u8);

        assert_eq!(facts.get::<u8>(), Some(&2));
        assert_eq!(facts.get::<&str>(), Some(&"text"));
        assert_eq!(facts.get::<u16>(), None);
    }

    #[test]
    fn a_long_list_of_facts_is_dropped_on_a_small_stack() {
        let drop_many = || {
            let facts = Facts::default();
            (0..10_000_u32).for_each(|fact| facts.insert(fact));
            drop(facts);
        };
        let thread = std::thread::Builder::new().stack_size(64 * 1024);

        let dropped = thread.spawn(drop_many).expect("a thread starts").join();

        assert!(dropped.is_ok());
    }
}

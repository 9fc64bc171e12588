//! The adapters that requests can name, by id.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::error::{EngineError, RequestError};
use crate::layers::Adapter;

/// What requests call an adapter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AdapterId(pub String);

impl fmt::Display for AdapterId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// The adapters that requests can name.
#[derive(Debug, Default)]
pub struct Adapters {
    loaded: BTreeMap<AdapterId, Arc<Adapter>>,
}

impl Adapters {
    /// Lets requests name it. Errors when the id is taken.
    pub fn add(&mut self, id: AdapterId, adapter: Arc<Adapter>) -> Result<(), EngineError> {
        if self.loaded.contains_key(&id) {
            return Err(EngineError::AdapterExists(id.0));
        }
        self.loaded.insert(id, adapter);
        Ok(())
    }

    /// Requests that come later cannot name it.
    pub fn remove(&mut self, id: &AdapterId) {
        self.loaded.remove(id);
    }

    /// The adapter of this id.
    pub fn find(&self, id: &AdapterId) -> Result<Arc<Adapter>, RequestError> {
        self.loaded.get(id).cloned().ok_or_else(|| RequestError::Adapter(id.0.clone()))
    }

    /// All ids, in order.
    pub fn ids(&self) -> Vec<AdapterId> {
        self.loaded.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_that_is_removed_lives_on_where_it_is_used() {
        let id = || AdapterId("a".to_owned());
        let mut adapters = Adapters::default();
        adapters.add(id(), Arc::default()).unwrap();
        assert!(matches!(adapters.add(id(), Arc::default()), Err(EngineError::AdapterExists(_))));
        let used = adapters.find(&id()).unwrap();
        adapters.remove(&id());
        assert!(matches!(adapters.find(&id()), Err(RequestError::Adapter(_))));
        assert_eq!(Arc::strong_count(&used), 1);
    }
}

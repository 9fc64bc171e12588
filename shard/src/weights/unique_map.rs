//! A JSON object as a map, in which no name may occur twice.

use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::error::shown;

/// Names to values. JSON leaves open which value counts when a name occurs twice, so here that is an error.
#[derive(Debug)]
pub(super) struct UniqueMap<V>(pub(super) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

struct Entries<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some(name) = object.next_key::<String>()? {
            match entries.entry(name) {
                Entry::Occupied(first) => {
                    return Err(A::Error::custom(format_args!("`{}` is there twice", shown(first.key()))));
                }
                Entry::Vacant(place) => {
                    place.insert(object.next_value()?);
                }
            }
        }
        Ok(UniqueMap(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_occurs_twice_is_an_error_that_names_it() {
        let map: UniqueMap<u8> = serde_json::from_str(r#"{"a": 1, "b": 2}"#).unwrap();
        assert_eq!(map.0, BTreeMap::from([("a".to_owned(), 1), ("b".to_owned(), 2)]));
        let twice = serde_json::from_str::<UniqueMap<u8>>(r#"{"a": 1, "a": 1}"#).unwrap_err();
        assert!(twice.to_string().contains("`a` is there twice"), "{twice}");
    }
}

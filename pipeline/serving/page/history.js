// The images of this browser, in IndexedDB. Knows records; shows nothing.

const NAME = "minidalle";
const STORE = "images";
const MOST = 200;

/** Images that stay after a reload. Where the browser refuses, nothing is kept. */
export class History {
  #base = null;

  async open() {
    try {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
      };
      this.#base = await done(opening);
    } catch {
      this.#base = null;
    }
  }

  /**
   * Keeps a record, and drops the oldest ones of all bundles beyond the limit. Returns whether the
   * browser kept it, where it keeps any.
   */
  async add(record) {
    if (!this.#base) return true;
    try {
      const transaction = this.#base.transaction(STORE, "readwrite");
      await Promise.all([ended(transaction), added(transaction.objectStore(STORE), record)]);
      return true;
    } catch {
      return false;
    }
  }

  /** All records of a bundle, the oldest first. */
  async all(bundle) {
    if (!this.#base) return [];
    const records = await done(this.#store("readonly").getAll());
    return records.filter((record) => record.bundle === bundle);
  }

  /** Removes all records. Returns whether the browser did. */
  async clear() {
    if (!this.#base) return true;
    try {
      await done(this.#store("readwrite").clear());
      return true;
    } catch {
      return false;
    }
  }

  #store(mode) {
    return this.#base.transaction(STORE, mode).objectStore(STORE);
  }
}

async function added(store, record) {
  await done(store.add(record));
  const keys = await done(store.getAllKeys());
  await Promise.all(keys.slice(0, -MOST).map((key) => done(store.delete(key))));
}

/** A transaction's end: a browser without room may find that out at the commit. */
function ended(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });
}

function done(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

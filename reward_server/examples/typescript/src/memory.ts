/** Values by key, up to a bound; beyond it, what was used longest ago is forgotten. */
export class Memory<Value> {
  // A Map keeps its keys in the order of their insertion: whatever is used goes to the end again.
  readonly #entries = new Map<string, Value>();

  constructor(readonly capacity: number) {}

  get(key: string): Value | undefined {
    const value = this.#entries.get(key);
    if (value !== undefined) this.set(key, value);
    return value;
  }

  set(key: string, value: Value): void {
    this.#entries.delete(key);
    this.#entries.set(key, value);
    if (this.#entries.size > this.capacity) {
      const [oldest] = this.#entries.keys();
      this.#entries.delete(oldest!);
    }
  }
}

// What the user's settings keep for us: names of adapters.
export const FAVOURITES = "LoHa.Favourites";
export const RECENT = "LoHa.Recent";

const hidden = (/** @type {string} */ id, /** @type {string} */ name) => ({ id, name, type: "hidden", defaultValue: [] });

export const settings = [hidden(FAVOURITES, "LoHa: favourites"), hidden(RECENT, "LoHa: recently used")];

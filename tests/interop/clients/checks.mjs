// Named checks, run one after the other; prints each with its time and ends with a count. Exit 1 if any failed.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

// The packages are in the cache, not beside this file.
const require = createRequire(`${process.env.CLIENT_MODULES}/package.json`);

export const load = (name) => import(pathToFileURL(require.resolve(name)).href);
export const version = (name) => require(`${process.env.CLIENT_MODULES}/node_modules/${name}/package.json`).version;

export async function run(title, checks) {
  let failed = 0;
  for (const [name, check] of Object.entries(checks)) {
    const began = Date.now();
    try {
      await check();
      console.log(`  ok      ${name} (${((Date.now() - began) / 1000).toFixed(1)} s)`);
    } catch (error) {
      failed += 1;
      console.log(`  FAILED  ${name}\n`, error);
    }
  }
  console.log(`${title}: ${Object.keys(checks).length - failed} passed, ${failed} failed`);
  process.exit(failed ? 1 : 0);
}

//! Elementary functions as vector code.

use crate::ops::Code;
use tilewright_base::DType;

impl Code {
    /// An elementary function by its name.
    pub(crate) fn math(&mut self, name: &str, d: DType, lanes: u32, x: &[&str]) -> String {
        let e = crate::ops::reg_elem(d);
        self.helper_call(name, e, lanes, e, x)
    }

    /// Calls a helper function on vectors of `lanes`.
    pub(crate) fn helper_call(
        &mut self,
        name: &str,
        ret: &str,
        lanes: u32,
        arg: &str,
        x: &[&str],
    ) -> String {
        let full = format!("tw.{name}.{}", crate::ops::suffix(arg, lanes));
        let v = crate::ops::vector(arg, lanes);
        let args: Vec<String> = x.iter().map(|x| format!("{v} {x}")).collect();
        let ret = crate::ops::vector(ret, lanes);
        self.t.ins(format_args!("call {ret} @{full}({})", args.join(", ")))
    }

    /// Uniform numbers in [0, 1).
    pub(crate) fn random(&mut self, _d: DType, _seed: u64, counter: &str, _lanes: u32) -> String {
        counter.to_owned()
    }
}
